"""What every test starts from: no switch of the user's, no counts left over, one thread."""

from __future__ import annotations

import os

import pytest
import torch

import nsa_sel
from nsa_sel import execute

# Triton reads this when it is first imported. Without a GPU its kernels are interpreted on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_SWITCHES = (
    "NSA_SEL_CUDA",
    "NSA_SEL_TRITON",
    "NSA_SEL_TRITON_MIN_L",
    "NSA_SEL_TRITON_FORCE",
    "NSA_SEL_POLICY",
    "NSA_SEL_DEBUG",
)


@pytest.fixture(autouse=True)
def clean_routing(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Route as on a fresh machine: neither the environment nor a policy of the user's may decide a test."""
    for name in _SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "no-configuration"))
    monkeypatch.setattr(execute, "_refused", frozenset())
    monkeypatch.setattr(execute, "_warned", set())
    nsa_sel.refresh_routing()
    nsa_sel.reset_stats()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep parallel test workers from fighting over the cores: the tensors are small, the waiting would not be."""
    torch.set_num_threads(1)

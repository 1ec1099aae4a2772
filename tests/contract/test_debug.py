"""NSA_SEL_DEBUG: what it logs, that it finds a wrong backend, and that it changes no result."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel import debug
from nsa_sel.backends import sdpa

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """Return a function that sets NSA_SEL_DEBUG and routes again; put back afterwards."""
    caplog.set_level(logging.INFO, logger="nsa_sel")

    def switch(value: str) -> None:
        monkeypatch.setenv("NSA_SEL_DEBUG", value)
        nsa_sel.refresh_routing()

    yield switch
    monkeypatch.undo()
    nsa_sel.refresh_routing()


def _inputs(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 2, 4, 64, generator=generator).to(dtype)
    k, v = (torch.randn(3, 2, 128, 64, generator=generator).to(dtype) for _ in range(2))
    ranges = torch.tensor([[10, 60], [90, 128]], dtype=torch.int32).expand(3, 2, 2, 2, 2)
    return q, k, v, ranges


def test_unset_logs_nothing(switched: Any, caplog: pytest.LogCaptureFixture) -> None:
    switched("")
    nsa_sel.selection_attention(*_inputs())
    assert caplog.records == []


def test_timing_logs_path_reason_and_time(switched: Any, caplog: pytest.LogCaptureFixture) -> None:
    switched("timing")
    nsa_sel.selection_attention(*_inputs())
    (record,) = caplog.records
    assert re.search(r"^sdpa \(tensors on cpu\): [\d.]+ ms, B=3 S=2 G=2 h=4 .* L bound unknown$", record.getMessage())
    assert (record.name, record.levelname) == ("nsa_sel", "INFO")


@pytest.mark.parametrize("return_lse", [False, True])
def test_compare_logs_the_error_against_the_oracle(
    switched: Any, caplog: pytest.LogCaptureFixture, return_lse: bool
) -> None:
    switched("compare")
    nsa_sel.selection_attention(*_inputs(), return_lse=return_lse)
    (record,) = caplog.records
    found = re.search(
        r"^sdpa against the oracle: MAE ([\d.e-]+), largest error [\d.e-]+(, largest lse error)?", record.getMessage()
    )
    assert found is not None
    assert 0 < float(found[1]) < 1e-3
    assert (found[2] is not None) == return_lse
    assert record.levelname == "INFO"
    assert "over 8 rows" in record.getMessage()


@pytest.mark.parametrize("wrong", ["off", "nan", "lse", "last row"])
def test_compare_finds_a_wrong_backend(
    switched: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    right = sdpa.run

    def broken(call: Any) -> Any:
        out, lse = right(call)
        if wrong == "lse":
            return out, lse + 0.1
        if wrong == "last row":
            out[-1, -1, -1] += 1
            return out, lse
        return (out + 0.01 if wrong == "off" else out * float("nan")), lse

    monkeypatch.setattr(sdpa, "run", broken)
    switched("compare")
    nsa_sel.selection_attention(*_inputs(), return_lse=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"


def test_both_modes_and_the_result_is_the_same(switched: Any, caplog: pytest.LogCaptureFixture) -> None:
    switched("")
    plain = nsa_sel.selection_attention(*_inputs())
    switched("compare,timing")
    nsa_sel.reset_stats()
    watched = nsa_sel.selection_attention(*_inputs())
    assert torch.equal(plain, watched)
    assert len(caplog.records) == 2
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}  # the oracle beside it counts as no call


def test_empty_rows_and_empty_calls(switched: Any, caplog: pytest.LogCaptureFixture) -> None:
    switched("compare")
    q, k, v, ranges = _inputs()
    nsa_sel.selection_attention(q, k, v, torch.zeros_like(ranges), return_lse=True)
    nsa_sel.selection_attention(q[:0], k[:0], v[:0], ranges[:0])
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "MAE 0, largest error 0, largest lse error 0" in record.getMessage()


def test_gradients_pass_through(switched: Any) -> None:
    switched("compare,timing")
    q, k, v, ranges = _inputs(torch.float32)
    q.requires_grad_()
    nsa_sel.selection_attention(q, k, v, ranges).sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


def test_messages_are_seen_without_any_logging_set_up() -> None:
    code = (
        "import torch, nsa_sel\n"
        "q, k = torch.zeros(1, 1, 1, 1, 8), torch.zeros(1, 1, 4, 8)\n"
        "nsa_sel.selection_attention(q, k, k, torch.tensor([[[[[0, 4]]]]]))\n"
    )
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"NSA_SEL_DEBUG": "timing", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert re.search(r"^nsa_sel INFO: sdpa \(tensors on cpu\): [\d.]+ ms", done.stderr, re.MULTILINE)


def test_sampled_rows_hold_the_first_and_the_last() -> None:
    from nsa_sel.check import check

    q, k, v, ranges = _inputs()
    rows = debug._sampled(check(q, k, v, ranges))
    assert rows[0] == (0, 0, 0)
    assert rows[-1] == (2, 1, 1)
    assert len(set(rows)) == 8

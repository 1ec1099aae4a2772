"""The backends: each module says in `limits` what it cannot take and computes in `run`; a new one is a line here.

A module is imported when it is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import Protocol, cast

import torch

from nsa_sel.call import Call
from nsa_sel.devices import DeviceInfo

NAMES = ("cuda", "triton", "sdpa")


class Backend(Protocol):
    """What routing and execution ask of a backend."""

    def limits(self, call: Call, device: DeviceInfo | None) -> str | None:
        """Say why this backend cannot take `call`, whose tensors lie on the GPU `device`; None where it can."""
        ...

    def run(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a checked call: out [B, S, G, h, Dv] in q's dtype and, if asked for, lse [B, S, G, h] fp32."""
        ...


@functools.cache
def get(name: str) -> Backend:
    """Return a backend by its name."""
    return cast(Backend, importlib.import_module(f"nsa_sel.backends.{name}"))

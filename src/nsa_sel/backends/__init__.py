"""The backends: each module has `unavailable(problem) -> str | None` and `run(call) -> (out, lse | None)`.

A module is imported when it is first asked for, and only where this build can use it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Protocol, cast

import torch

from nsa_sel import _build
from nsa_sel.problem import Call, Problem


class Backend(Protocol):
    """What routing and the public function ask of a backend."""

    def unavailable(self, problem: Problem) -> str | None:
        """Say why this backend cannot run `problem`; None where it can."""
        ...

    def run(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a checked call: out [B, S, G, h, Dv] in v's dtype and, if asked for, lse [B, S, G, h] fp32."""
        ...


@functools.cache
def find(name: str) -> Backend | None:
    """Return a backend, or None where this build does not hold it."""
    if name == "cuda" and not _build.routing_build().kernels:
        return None
    module = f"nsa_sel.backends.{name}"
    if importlib.util.find_spec(module) is None:
        return None
    return cast(Backend, importlib.import_module(module))


def get(name: str) -> Backend:
    """Return a backend that routing has chosen."""
    backend = find(name)
    assert backend is not None, f"routing chose {name!r}, which this build does not hold"
    return backend

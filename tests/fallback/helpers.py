"""What the tests of packed SDPA share."""

from __future__ import annotations

from typing import Any

import pytest

from nsa_sel.backends import sdpa
from nsa_sel.call import Call
from nsa_sel.check import check
from nsa_sel.testing import Inputs


def call_of(inputs: Inputs, **options: Any) -> Call:
    """Check the inputs, lse asked for."""
    return check(**inputs.arguments(return_lse=True, **options))


def difference(before: sdpa.Counters) -> sdpa.Counters:
    """Return what packed SDPA has done since `before`."""
    after = sdpa.counters()
    return sdpa.Counters(
        after.calls - before.calls,
        after.chunks - before.chunks,
        after.gathered_bytes - before.gathered_bytes,
        after.read_backs - before.read_backs,
    )


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every call believe that a CUDA graph is being captured."""
    monkeypatch.setattr(sdpa, "_is_capturing", lambda call: True)

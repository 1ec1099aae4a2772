"""The NSA decode step under pytest-benchmark: one whole step, by context."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from nsa_sel.measure.run.clock import one_thread
from nsa_sel.measure.run.decode_step import DecodeStep
from nsa_sel.measure.run.race import counts, proof
from nsa_sel.measure.run.session import selecting_backend


@pytest.mark.parametrize("context", [1024, 4096])
def test_decode_step(context: int, device: torch.device, benchmark: Any) -> None:
    """Time the step with the backend that `nsa-sel decode` would take, and prove that it ran."""
    backend, _ = selecting_backend("", device)
    step = DecodeStep(1, context, backend, device)
    before = counts()

    def once() -> None:
        step.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"decode step, context {context}"
    with one_thread(device):
        benchmark.pedantic(once, rounds=50, iterations=1, warmup_rounds=5)
    benchmark.extra_info.update({"select": backend, "tokens_selected": step.selected_tokens()})
    ran = Counter(counts())
    ran.subtract(before)
    assert proof(backend, ran, step.select_calls) == backend

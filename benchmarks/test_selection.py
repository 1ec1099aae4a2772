"""Selection attention under pytest-benchmark: `pytest benchmarks/`, and `--benchmark-autosave`, `--benchmark-compare`.

The same workloads, inputs and contestants as `nsa-sel bench` and the step of `nsa-sel decode`, with pytest-benchmark's
statistics and comparisons; the gate reads those commands alone. Inputs are warm here: they are called again and again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_sel.measure.run.clock import one_thread
from nsa_sel.measure.run.contestants import check_of, contestants, moved_bytes
from nsa_sel.measure.run.decode_step import DecodeStep
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import PEERS, load_peers
from nsa_sel.measure.run.race import Oracle, Settings, counts, errors, proof, set_up, too_large
from nsa_sel.measure.run.session import selecting_backend
from nsa_sel.measure.run.workload import Workload
from nsa_sel.measure.schema import HERE


@pytest.fixture(scope="module")
def inputs(workload: Workload, device: torch.device) -> tuple[Inputs, Oracle]:
    """Return one variant of the workload's inputs, and what is right for them."""
    if reason := too_large(workload, device):
        pytest.skip(reason)
    variants, oracle = set_up(workload, Settings(device, ()))
    return variants[0], oracle


@pytest.mark.parametrize("name", [*HERE, *PEERS])
def test_selection(name: str, inputs: tuple[Inputs, Oracle], device: torch.device, benchmark: Any) -> None:
    """Time one contestant on one workload, prove that it ran, and compare its result with the fp64 reference."""
    one, oracle = inputs
    workload = one.workload
    found, absent = load_peers([name] if name in PEERS else [], Path(__file__).with_name("peers"))
    (contestant,) = found or contestants([name]) or [None]
    if reason := absent.get(name) or (contestant.refuses(one) if contestant else None):
        pytest.skip(f"{name} is not measured: {reason}")
    assert contestant is not None
    out = timed(benchmark, workload.name, contestant.prepare(one), name, device)
    mae, max_err = errors(out, *oracle)
    more = {"dist": workload.dist, "L": workload.L, "rows": workload.rows, "bytes": moved_bytes(one)}
    benchmark.extra_info.update({"ran": name, "mae": mae, "max_err": max_err} | more)
    assert mae <= check_of(workload)


@pytest.mark.parametrize("context", [1024, 4096])
def test_decode_step(context: int, device: torch.device, benchmark: Any) -> None:
    """Time a whole NSA decode step with the backend that `nsa-sel decode` would take, and prove that it ran."""
    backend, _ = selecting_backend("", device)
    step = DecodeStep(1, context, backend, device)
    timed(benchmark, f"decode step, context {context}", step.run, backend, device)
    benchmark.extra_info.update({"select": backend, "tokens_selected": step.selected_tokens()})


def timed(benchmark: Any, group: str, call: Callable[[], Any], name: str, device: torch.device) -> Any:
    """Time a call in 50 rounds, prove that `name` ran in each, and return the last result."""
    calls, before = 0, counts()

    def once() -> Any:
        nonlocal calls
        calls += 1
        out = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return out

    benchmark.group = group
    with one_thread(device):
        out = benchmark.pedantic(once, rounds=50, iterations=1, warmup_rounds=5)
    ran = Counter(counts())
    ran.subtract(before)
    assert proof(name, ran, calls) == name
    return out

"""Selection attention under pytest-benchmark: `pytest benchmarks/`, and `--benchmark-autosave`, `--benchmark-compare`.

The same workloads, inputs and contestants as `nsa-sel bench`, with pytest-benchmark's statistics and comparisons; the
gate reads `nsa-sel bench` alone. Inputs are warm here: one variant of them is called again and again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_sel.measure.run.clock import one_thread
from nsa_sel.measure.run.contestants import check_of, moved_bytes, own_contestants
from nsa_sel.measure.run.inputs import Inputs, oracle_rows, variants_of
from nsa_sel.measure.run.peers import PEERS, load_peers
from nsa_sel.measure.run.race import counts, errors, free_memory, proof, too_large
from nsa_sel.measure.run.workload import Workload
from nsa_sel.measure.schema import HERE
from nsa_sel.reference import selection_attention_reference


@pytest.fixture(scope="module")
def inputs(workload: Workload, device: torch.device) -> Inputs:
    """Return one variant of the workload's inputs."""
    if reason := too_large(workload, device):
        pytest.skip(reason)
    return variants_of(workload, 0, device, 0, free_memory(device) // 3)[0]


@pytest.mark.parametrize("name", [*HERE, *PEERS])
def test_selection(name: str, inputs: Inputs, device: torch.device, peers_folder: Path, benchmark: Any) -> None:
    """Time one contestant on one workload, prove that it ran, and hold its result against the oracle."""
    workload = inputs.workload
    found, absent = load_peers([name] if name in PEERS else [], peers_folder)
    if name in absent:
        pytest.skip(f"{name} is not measured: {absent[name]}")
    (contestant,) = found or own_contestants([name])
    if reason := contestant.refuses(inputs):
        pytest.skip(f"{name} is not measured: {reason}")

    call = contestant.prepare(inputs)
    calls, before = 0, counts()

    def once() -> torch.Tensor:
        nonlocal calls
        calls += 1
        out = call()
        _wait(device)
        return out

    benchmark.group = workload.name
    with one_thread(device):
        out = _rounds(benchmark, once)
    rows = oracle_rows(workload, 0)
    expected, _ = selection_attention_reference(inputs.q, inputs.k, inputs.v, **inputs.selection(), rows=rows)
    mae, max_err = errors(out, expected, rows)
    benchmark.extra_info.update(
        {"ran": name, "dist": workload.dist, "L": workload.L, "rows": workload.rows, "bytes": moved_bytes(inputs)}
        | {"mae": mae, "max_err": max_err}
    )
    ran = Counter(counts())
    ran.subtract(before)
    assert proof(name, ran, calls) == name
    assert mae <= check_of(workload)


def _rounds(benchmark: Any, once: Callable[[], torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = benchmark.pedantic(once, rounds=50, iterations=1, warmup_rounds=5)
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Calls in several streams at once do not disturb each other: launches of the kernel, interleaved on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests import host_run
from tests.host_run import Device, Options
from tests.host_run.kernel import Prepared, prepare
from tests.host_run.streams import run_streams

SEEDS = range(6)
A100 = Device(sm_count=4, capability=80, smem_per_block=166_912, smem_per_sm=167_936)
H200 = Device(sm_count=8, capability=90, smem_per_block=232_448, smem_per_sm=233_472)


@dataclass(frozen=True)
class Way:
    """How the splits of a row are merged."""

    device: Device
    num_splits: int
    cluster: bool
    calls: int = 3


WAYS = {
    "combine kernel": Way(A100, 3, cluster=False),
    "clusters": Way(H200, 4, cluster=True),
    "combine kernel set up early": Way(H200, 9, cluster=False),  # programmatic dependent launch
}
WITH_WORKSPACE = [name for name, way in WAYS.items() if not way.cluster]


def arguments(way: Way, seed: int) -> dict[str, Any]:
    """Return a call of two rows, its inputs drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 1, 1, 4, 64, generator=generator).bfloat16()
    k, v = (torch.randn(2, 1, 256, 64, generator=generator).bfloat16() for _ in range(2))
    start = torch.randint(0, 100, (2, 1, 1, 2), generator=generator)
    ranges = torch.stack([start, start + torch.tensor([70, 90])], -1).int()
    return dict(
        q=q, k=k, v=v, ranges=ranges, num_splits=way.num_splits, return_lse=True, options=Options(device=way.device)
    )


def prepared(way: Way, seed: int) -> Prepared:
    call = prepare(**arguments(way, seed))
    call.out.fill_(math.nan)  # what did not run cannot pass
    assert call.plan["num_splits"] == way.num_splits
    assert bool(call.plan["cluster"]) == way.cluster
    assert (call.workspace.numel() == 0) == way.cluster
    assert call.plan["grid"] > 1  # blocks to interleave
    return call


def alone(way: Way, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    run = host_run.selection_attention(**arguments(way, seed))
    assert run.findings == []
    assert run.lse is not None
    assert not run.out.isnan().any()
    return run.out, run.lse


def right(call: Prepared, expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    assert call.lse is not None
    return torch.equal(call.out, expected[0]) and torch.equal(call.lse, expected[1])


@pytest.mark.parametrize("name", WAYS)
def test_streams_do_not_disturb_each_other(name: str) -> None:
    way = WAYS[name]
    expected = [alone(way, call) for call in range(way.calls)]
    for seed in SEEDS:
        calls = [prepared(way, call) for call in range(way.calls)]
        assert run_streams([[call] for call in calls], seed) == []
        assert all(right(call, one) for call, one in zip(calls, expected, strict=True)), f"seed {seed}"


@pytest.mark.parametrize("name", WAYS)
def test_replays_of_one_call_overlap(name: str) -> None:
    """The same inputs, twice in each of two streams, each call with an output and a workspace of its own."""
    way = WAYS[name]
    inputs = arguments(way, 7)
    expected = alone(way, 7)
    for seed in SEEDS:
        streams = [[prepare(**inputs) for _ in range(2)] for _ in range(2)]
        for call in (call for stream in streams for call in stream):
            call.out.fill_(math.nan)
        assert run_streams(streams, seed) == []
        assert all(right(call, expected) for stream in streams for call in stream), f"seed {seed}"


@pytest.mark.parametrize("name", WITH_WORKSPACE)
def test_one_workspace_may_serve_the_calls_of_one_stream(name: str) -> None:
    """As the caching allocator hands it out again: order within a stream is enough."""
    way = WAYS[name]
    expected = [alone(way, call) for call in range(2)]
    for seed in SEEDS:
        calls = [prepared(way, call) for call in range(2)]
        calls[1].workspace = calls[0].workspace
        assert run_streams([calls], seed) == []
        assert all(right(call, one) for call, one in zip(calls, expected, strict=True)), f"seed {seed}"


@pytest.mark.parametrize("name", WITH_WORKSPACE)
def test_a_workspace_that_two_streams_share_is_found(name: str) -> None:
    """What the tests above would say of a kernel that keeps its partials in one place for all calls."""
    way = WAYS[name]
    expected = [alone(way, call) for call in range(2)]
    wrong = 0
    for seed in SEEDS:
        calls = [prepared(way, call) for call in range(2)]
        calls[1].workspace = calls[0].workspace
        findings = run_streams([[call] for call in calls], seed)
        assert any(text.startswith("stream-race") for text in findings), f"seed {seed}: {findings}"
        wrong += not all(right(call, one) for call, one in zip(calls, expected, strict=True))
    assert wrong > 0, "blocks of the two streams were never interleaved"

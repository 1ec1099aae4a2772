"""CUDA graphs and streams on a GPU: replays see what was changed in place, nothing is shared between launches.

The same checks run on the emulator in `make gpu DRY=1`; here a replay is that of a real graph.
"""

from __future__ import annotations

import pytest
import torch

import nsa_sel
from benchmarks.gpu import replays
from nsa_sel.testing import assert_matches_reference
from tests.backends_under_test import no_kernels
from tests.cases import Case, case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(no_kernels() is not None, reason=f"cuda: {no_kernels()}"),
]


def kernel_calls() -> int:
    return sum(nsa_sel.stats().get("cuda", {}).values())


@pytest.mark.parametrize("name", list(replays.CHECKS))
@pytest.mark.parametrize("shape", replays.SHAPES, ids=lambda shape: shape.name)
def test_replay(shape: Case, name: str) -> None:
    before = kernel_calls()
    replays.CHECKS[name](shape, replays.GraphReplay)
    assert kernel_calls() == before + 2  # one to set up, one captured; replays do not come back to Python


def test_replays_of_two_graphs_overlap() -> None:
    before = kernel_calls()
    replays.overlapping_graphs()
    assert kernel_calls() == before + 4


def test_calls_on_several_streams_at_once() -> None:
    before = kernel_calls()
    replays.concurrent_streams(streams=4, rounds=10)
    assert kernel_calls() == before + 4 * len(replays.SHAPES) * 11


def test_one_graph_holds_several_calls() -> None:
    """Calls of one graph run one after another: the second may not be given the first one's workspace too early."""
    shape = replays.SHAPES[-1]
    made = [shape.inputs(), case("nsa-paper-short").inputs(), shape.inputs()]
    inputs = [one.to("cuda") for one in made]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for one in inputs:
            nsa_sel.selection_attention(**one.arguments(backend="cuda", return_lse=True))
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [nsa_sel.selection_attention(**one.arguments(backend="cuda", return_lse=True)) for one in inputs]
    for _ in range(3):
        for out, lse in results:
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        for (out, lse), one in zip(results, made, strict=True):
            assert_matches_reference(out.cpu(), lse.cpu(), one)


def test_a_call_waits_for_the_stream_it_is_on() -> None:
    """What the stream has still to write is what the call reads: nothing runs on the default stream instead."""
    wrong, right = case("blocks-64").inputs(), case("blocks-64").inputs()
    late = wrong.to("cuda")
    values = right.to("cuda")
    late.q.fill_(0)
    big = torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):  # milliseconds of work before q is right
            big = (big @ big).clamp(-1, 1)
        late.q.copy_(values.q)
        out, lse = nsa_sel.selection_attention(**late.arguments(backend="cuda", return_lse=True))
    torch.cuda.synchronize()
    assert_matches_reference(out.cpu(), lse.cpu(), right)

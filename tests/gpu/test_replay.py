"""One launch, replayed while its inputs change in place; two at once; the same bits each time.

On a GPU a replay is that of a CUDA graph. On the emulator it is the prepared launch run again, and streams are blocks
interleaved in random order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import pytest
import torch

import nsa_sel
from nsa_sel.testing import Inputs, assert_matches_reference
from tests import host_run
from tests.backends_under_test import backend, no_kernels
from tests.cases import Case, blocks, case
from tests.host_run import mutation
from tests.host_run.kernel import prepare
from tests.host_run.streams import run_streams

Result = tuple[torch.Tensor, torch.Tensor]  # out, lse

# Rows that split over blocks and rows that do not, spans and blocks, plain and paged, short lists of lengths.
SHAPES = (
    case("pages-16"),
    case("blocks-seq-lens"),
    case("seq-lens"),
    case("nsa-paper-short"),
    replace(case("pages-minimax-m3"), name="minimax-m3-short"),
    Case("one-long-row", blocks(), G=1, h=16, Dk=128, Dv=128, block_size=64, n=24, S_kv=2048, seed=41, heavy=True),
)


class Replay(Protocol):
    """A captured call whose inputs may change in place before it runs again."""

    inputs: Inputs

    def run(self) -> Result:
        """Run it once more and wait; the results are overwritten by the next run."""


class GraphReplay:
    """The call in a CUDA graph, forced to the kernel."""

    def __init__(self, inputs: Inputs, stream: torch.cuda.Stream | None = None) -> None:
        self.inputs = inputs.to("cuda")
        self.stream = stream or torch.cuda.Stream()
        call = self.inputs.arguments(return_lse=True, backend="cuda", max_selected=longest(inputs))
        torch.cuda.synchronize()  # the inputs were copied on another stream
        with torch.cuda.stream(self.stream):  # lazy set-up must not fall into the capture
            nsa_sel.selection_attention(**call)
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.result: Any = nsa_sel.selection_attention(**call)

    def start(self) -> None:
        """Start one replay on its own stream and do not wait."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def run(self) -> Result:
        """Replay and wait."""
        torch.cuda.synchronize()  # what was changed in place was changed on another stream
        self.start()
        torch.cuda.synchronize()
        return self.result


class HostReplay:
    """The call prepared once on the emulator."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        options = host_run.Options(device=mutation.H200)
        call = inputs.arguments(return_lse=True, max_selected=longest(inputs))
        self.call = prepare(**call, options=options)
        assert self.call.lse is not None
        self.result = (self.call.out, self.call.lse)

    def run(self) -> Result:
        """Launch as prepared; what is not written is NaN, the workspace's partials as well."""
        for tensor in (*self.result, self.call.workspace):
            tensor.fill_(torch.nan)
        assert run_streams([[self.call]], seed=1) == []
        return self.result


def longest(inputs: Inputs) -> int:
    """Return a bound of L that holds for every selection a check puts in: each slot at its longest."""
    if inputs.block_indices is not None:
        return inputs.block_indices.shape[3] * int(inputs.block_size or 0)
    assert inputs.ranges is not None
    pages = 1 if inputs.block_table is None else inputs.block_table.shape[1]
    return inputs.ranges.shape[3] * pages * inputs.k.shape[2]


def put(replay: Replay, other: Inputs) -> None:
    """Write another call's values into the captured tensors."""
    for field in fields(Inputs):
        mine, new = getattr(replay.inputs, field.name), getattr(other, field.name)
        if isinstance(mine, torch.Tensor):
            mine.copy_(new)


def right(result: Result, inputs: Inputs) -> None:
    """Hold a result against the oracle."""
    assert_matches_reference(result[0].cpu(), result[1].cpu(), inputs.to("cpu"))


def changed_in_place(shape: Case, make: Callable[[Inputs], Replay]) -> None:
    """Other ranges or blocks, lengths, page tables and values: every replay sees what stands there now."""
    replay = make(shape.inputs())
    for seed in (shape.seed + 1, shape.seed + 2):
        other = replace(shape, seed=seed)
        if shape.seq_lens is not None:
            other = replace(other, seq_lens=tuple(reversed(shape.seq_lens)))
        put(replay, other.inputs())
        right(replay.run(), replay.inputs)


def emptied_and_filled(shape: Case, make: Callable[[Inputs], Replay]) -> None:
    """A replay in which nothing is selected gives 0 and -inf, and the one after it is right again."""
    replay = make(shape.inputs())
    kept = replay.inputs.ranges if replay.inputs.ranges is not None else replay.inputs.block_indices
    assert kept is not None
    before = kept.clone()
    kept.fill_(-1)  # the span [-1, -1) and the unused slot
    out, lse = replay.run()
    assert not out.any()
    assert bool(lse.isneginf().all())
    kept.copy_(before)
    right(replay.run(), replay.inputs)


def same_bits(shape: Case, make: Callable[[Inputs], Replay]) -> None:
    """Twenty replays of the same inputs give the same bits; five on the emulator."""
    replay = make(shape.inputs())
    first = [tensor.clone() for tensor in replay.run()]
    for _ in range(20 if isinstance(replay, GraphReplay) else 5):
        same(replay.run(), first)


CHECKS: dict[str, Callable[[Case, Callable[[Inputs], Replay]], None]] = {
    "changed in place": changed_in_place,
    "emptied and filled": emptied_and_filled,
    "same bits": same_bits,
}


def overlapping_graphs(rounds: int = 20) -> None:
    """Two graphs replayed at once on two streams give what each gives alone."""
    pair = [GraphReplay(SHAPES[-1].inputs()), GraphReplay(case("nsa-paper-short").inputs())]
    alone = [[tensor.clone() for tensor in replay.run()] for replay in pair]
    for _ in range(rounds):
        for replay in pair:
            for tensor in replay.result:
                tensor.fill_(torch.nan)
        torch.cuda.synchronize()
        for _ in range(3):  # one alone would be over before the other starts
            for replay in pair:
                replay.start()
        torch.cuda.synchronize()
        for replay, expected in zip(pair, alone, strict=True):
            same(replay.result, expected)


def concurrent_streams(streams: int = 4, rounds: int = 10) -> None:
    """Eager calls on several streams at once give what they give one after another."""
    inputs = [replace(shape, seed=shape.seed + i).inputs().to("cuda") for i in range(streams) for shape in SHAPES]
    calls = [one.arguments(return_lse=True, backend="cuda") for one in inputs]
    alone: list[Any] = [nsa_sel.selection_attention(**call) for call in calls]
    torch.cuda.synchronize()
    side = [torch.cuda.Stream() for _ in range(streams)]
    for _ in range(rounds):
        results: list[Any] = []
        for index, call in enumerate(calls):
            with torch.cuda.stream(side[index % streams]):
                results.append(nsa_sel.selection_attention(**call))
        torch.cuda.synchronize()
        for got, want in zip(results, alone, strict=True):
            same(got, want)


def overlapping_on_the_emulator(rounds: int = 3) -> None:
    """Two prepared calls, each twice in a stream of its own, their blocks interleaved in random order."""
    pair = [HostReplay(case("pages-16").inputs()), HostReplay(case("nsa-paper-short").inputs())]
    alone = [[tensor.clone() for tensor in replay.run()] for replay in pair]
    for seed in range(rounds):
        for replay in pair:
            for tensor in (*replay.result, replay.call.workspace):
                tensor.fill_(torch.nan)
        assert run_streams([[replay.call] * 2 for replay in pair], seed) == []
        for replay, expected in zip(pair, alone, strict=True):
            same(replay.result, expected)


def streams_on_the_emulator(streams: int = 3) -> None:
    """Different calls in several streams, interleaved block by block."""
    calls = [HostReplay(replace(case("seq-lens"), seed=seed).inputs()) for seed in range(2 * streams)]
    alone = [[tensor.clone() for tensor in call.run()] for call in calls]
    for call in calls:
        for tensor in (*call.result, call.call.workspace):
            tensor.fill_(torch.nan)
    assert run_streams([[one.call for one in calls[first::streams]] for first in range(streams)], seed=5) == []
    for call, expected in zip(calls, alone, strict=True):
        same(call.result, expected)


def same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """Require the same bits; NaN, which stands for what was not written, is no match."""
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


ON_GPU = torch.cuda.is_available()
MAKE: Callable[[Inputs], Replay] = GraphReplay if ON_GPU else HostReplay
NO_RUN = no_kernels() if ON_GPU else backend("host-run-sm90").missing()
SMALL = bool(os.environ.get("NSA_SEL_SMALL")) or not ON_GPU
pytestmark = pytest.mark.skipif(NO_RUN is not None, reason=f"no kernel to replay: {NO_RUN}")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


def kernel_calls() -> int:
    return sum(nsa_sel.stats().get("cuda", {}).values())


@pytest.mark.parametrize("name", list(CHECKS))
@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if not (SMALL and shape.heavy)], ids=lambda shape: shape.name
)
def test_replay(shape: Case, name: str) -> None:
    before = kernel_calls()
    CHECKS[name](shape, MAKE)
    if ON_GPU:  # one to set up, one captured; replays do not come back to Python
        assert kernel_calls() == before + 2


def test_replays_overlap() -> None:
    before = kernel_calls()
    (overlapping_graphs if ON_GPU else overlapping_on_the_emulator)()
    assert kernel_calls() == before + (4 if ON_GPU else 0)


def test_calls_on_several_streams_at_once() -> None:
    before = kernel_calls()
    (concurrent_streams if ON_GPU else streams_on_the_emulator)()
    assert kernel_calls() == before + (4 * len(SHAPES) * 11 if ON_GPU else 0)


@pytest.mark.gpu
@needs_gpu
def test_one_graph_holds_several_calls() -> None:
    """Calls of one graph run one after another: the second may not be given the first one's workspace too early."""
    shape = SHAPES[-1]
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


@pytest.mark.gpu
@needs_gpu
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

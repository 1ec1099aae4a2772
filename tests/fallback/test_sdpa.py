"""Packed SDPA: what it gathers, what it remembers, what it reads back, and captured graphs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import nsa_sel
from nsa_sel.backends import _cpu, _gather, _plan, sdpa
from nsa_sel.call import Call
from nsa_sel.check import check
from nsa_sel.testing import assert_matches_reference
from tests.cases import CASES, Case, blocks, case, fixed, spans
from tests.fallback.helpers import call_of, capture, difference

CHUNKED = ("h4", "dims-192x128-bf16", "dims-64x64-fp64", "blocks-draft", "pages-packed", "many-rows", "seq-lens",
           "rows-of-very-different-length", "many-tiny-spans", "hostile-int64")  # fmt: skip


@pytest.mark.parametrize("budget", [10_000, 100_000])
@pytest.mark.parametrize("name", CHUNKED)
def test_any_budget_gives_the_same_answer(name: str, budget: int) -> None:
    inputs = case(name).inputs()
    before = sdpa.counters()
    out, lse = sdpa.run(call_of(inputs), budget)
    assert_matches_reference(out, lse, inputs)
    assert difference(before).chunks > 1, "nothing was split"


def test_a_budget_below_one_token_still_works() -> None:
    inputs = case("tile-edges").inputs()
    before = sdpa.counters()
    out, lse = sdpa.run(call_of(inputs), 1)
    assert_matches_reference(out, lse, inputs)
    assert difference(before).chunks == sum(len(inputs.tokens(row)) for row in inputs.rows())


@pytest.mark.parametrize("name", ["blocks-draft", "pages-packed", "seq-lens", "rows-of-very-different-length"])
def test_a_captured_graph_keeps_to_the_budget_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case(name).inputs()
    capture(monkeypatch)
    before = sdpa.counters()
    bound = max(len(inputs.tokens(row)) for row in inputs.rows())
    out, lse = sdpa.run(call_of(inputs, max_selected=bound), 50_000)
    assert_matches_reference(out, lse, inputs)
    assert difference(before).chunks > 1, "nothing was split"


@pytest.mark.parametrize("name", CHUNKED)
def test_no_chunk_takes_more_than_the_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    locate, attend = _gather.locate, _cpu.attend

    def spy(call: Call, selection: Any, rows: torch.Tensor, begin: int, end: int, masked: bool) -> Any:
        nonlocal largest
        largest = max(largest, rows.shape[0] * (end - begin))
        return locate(call, selection, rows, begin, end, masked)

    def spy_on_cpu(call: Call, selection: Any, rows: Any, lengths: Any, chunk: _plan.Chunk, count: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(rows) * chunk.tokens)
        return attend(call, selection, rows, lengths, chunk, count)

    monkeypatch.setattr(_gather, "locate", spy)
    monkeypatch.setattr(_cpu, "attend", spy_on_cpu)
    call = call_of(case(name).inputs())
    budget = 200_000
    sdpa.run(call, budget)
    assert 0 < largest * _plan.bytes_per_token(call) <= budget


lengths = st.lists(st.integers(0, 3000), min_size=1, max_size=80)
CALL = call_of(case("h4").inputs())


@given(lengths, st.integers(1, 10**8), st.booleans())
def test_plans_cover_every_token_once(lengths: list[int], budget: int, invariant: bool) -> None:
    ordered = np.sort(np.array(lengths))[::-1]
    problem = replace(CALL, batch_invariant=invariant)
    plan = _plan.make_plan(problem, ordered, budget, masked=False)
    rows = [row for chunk in plan for row in range(chunk.rows.start, chunk.rows.stop)]
    assert rows == list(range(int((ordered > 0).sum())))
    for chunk in plan:
        inside = ordered[chunk.rows]
        assert (inside <= chunk.tokens).all()
        assert chunk.masked or (inside == chunk.tokens).all()
        assert 0 < chunk.piece <= chunk.tokens


@given(lengths, lengths)
def test_an_invariant_row_always_meets_the_same_shapes(company: list[int], other: list[int]) -> None:
    """Kernels need not be indifferent to padding: what is added to a row must follow from its own L alone."""
    problem = replace(CALL, batch_invariant=True)
    shapes: dict[int, tuple[int, int, int]] = {}
    for batch in (company, other, company + other, [*other, 2999]):
        ordered = np.sort(np.array(batch))[::-1]
        for chunk in _plan.make_plan(problem, ordered, 10**6, masked=False):
            rows = chunk.rows.stop - chunk.rows.start + chunk.pad_rows
            for length in ordered[chunk.rows].tolist():
                assert shapes.setdefault(length, (rows, chunk.tokens, chunk.piece)) == (rows, chunk.tokens, chunk.piece)
                assert chunk.masked


def test_gathered_bytes_are_the_selected_bytes_where_rows_are_alike() -> None:
    inputs = Case("", blocks(), B=3, n=2, block_size=64).inputs()
    before = sdpa.counters()
    sdpa.run(call_of(inputs))
    count = difference(before)
    assert (count.calls, count.chunks, count.read_backs) == (1, 1, 1)
    assert count.gathered_bytes == 3 * 2 * 128 * (64 + 64) * 2


def test_one_long_row_does_not_pad_the_others() -> None:
    longest = 40_000
    rows = [[[0, 20]]] * 255 + [[[0, longest]]]
    inputs = Case("", fixed(rows), B=1, S=256, G=1, S_kv=longest + 1, causal=False).inputs()
    before = sdpa.counters()
    sdpa.run(call_of(inputs))
    count = difference(before)
    selected = (255 * 20 + longest) * (64 + 64) * 2
    assert selected <= count.gathered_bytes <= 1.01 * selected


def test_padding_at_most_doubles_what_is_gathered() -> None:
    inputs = Case("", spans(900), B=4, S=8, G=2, n=3, h=1, S_kv=2048, causal=False).inputs()
    before = sdpa.counters()
    sdpa.run(call_of(inputs))
    selected = sum(len(inputs.tokens(row)) for row in inputs.rows()) * (64 + 64) * 2
    assert selected <= difference(before).gathered_bytes <= 2 * selected


@pytest.mark.parametrize("L", [1, 100, 5000, 150_000])
def test_batch_invariance_gathers_little_more(L: int) -> None:
    """Padding every chunk to one number of rows and every row to a power of two gathered 28 times as much."""
    k = torch.randn(1, 1, 64).expand(1, 1, 150_000, 64)
    before = sdpa.counters()
    sdpa.run(check(torch.randn(1, 1, 1, 2, 64), k, k, torch.tensor([[[[[0, L]]]]]), batch_invariant=True))
    slots = difference(before).gathered_bytes // ((64 + 64) * 4)
    assert L <= slots <= max(1.1 * L, _plan.INVARIANT_SLOTS)


@pytest.mark.parametrize("S_kv", [4096, 2**20])
def test_gathered_bytes_do_not_depend_on_the_cache(S_kv: int) -> None:
    k = torch.randn(1, 1, 64).expand(1, 2, S_kv, 64)  # a long cache without its memory
    start = torch.arange(0, 4096, 256).view(1, 1, 1, 16, 1).expand(1, 1, 2, 16, 1)
    ranges = torch.cat([start, start + 64], dim=-1)
    before = sdpa.counters()
    nsa_sel.selection_attention(torch.randn(1, 1, 2, 4, 64), k, k, ranges)
    assert difference(before) == sdpa.Counters(1, 1, 2 * 1024 * (64 + 64) * 4, 1)


_PEAK = """
import sys, torch, nsa_sel
def peak():  # not ru_maxrss, which starts at the size of the process that forked this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
rows, L, S_kv = (int(a) for a in sys.argv[1:])
k = torch.zeros(1, 1, S_kv, 128, dtype=torch.bfloat16)
k += 1  # touch every page of the cache before the measuring starts
start = (torch.arange(rows).view(1, rows, 1, 1, 1) * 7) % (4096 - L + 1)
ranges = torch.cat([start, start + L], dim=-1)
q = torch.ones(1, rows, 1, 4, 128, dtype=torch.bfloat16)
nsa_sel.selection_attention(q[:, :1], k, k, ranges[:, :1], causal=False)  # libraries, threads, allocator
before = peak()
out = nsa_sel.selection_attention(q, k, k, ranges, causal=False)
after = peak()
assert torch.equal(out, torch.ones_like(out))
assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 2}}
print(after - before)
"""


def peak_kib(rows: int, L: int, S_kv: int) -> int:
    """Peak memory (KiB) that a call in a process of its own adds to its inputs."""
    command = [sys.executable, "-c", _PEAK, str(rows), str(L), str(S_kv)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peak_memory_does_not_depend_on_the_cache() -> None:
    short, long = peak_kib(64, 1024, 4096), peak_kib(64, 1024, 2**20)
    # a few rows at a time are gathered into a buffer that stays
    gathered = 64 * 1024 * 256 * 2 // 1024
    assert short < gathered // 4
    # one copy of the longer cache's K would show as 260,000 KiB
    assert abs(long - short) < 10_000, f"{short} KiB at 4,096 tokens, {long} KiB at 1,048,576"


@pytest.mark.slow
def test_4096_rows_of_4096_tokens_pass_within_2_gb() -> None:
    assert peak_kib(4096, 4096, 4096) < 2 * 2**20


@pytest.mark.parametrize("name", ["h4", "blocks-64", "pages-hostile", "many-rows"])
def test_one_read_back_a_call(name: str) -> None:
    before = sdpa.counters()
    sdpa.run(call_of(case(name).inputs()))
    assert difference(before).read_backs == 1


@pytest.mark.parametrize("options", [{}, {"max_selected": 100}, {"batch_invariant": True}])
@pytest.mark.parametrize("name", ["h4", "blocks-64", "pages-16", "draft-causal", "seq-lens-zero"])
def test_a_captured_graph_looks_at_no_value(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors hold no values: whoever looks at one fails."""
    inputs = case(name).inputs()
    before = sdpa.counters()
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in inputs.arguments().items()}
        call = check(**fake, return_lse=True, **options)
        with pytest.raises((RuntimeError, TypeError)):
            sdpa.run(call)  # outside a capture it does look: fake tensors notice
        capture(monkeypatch)
        out, lse = sdpa.run(call)
    assert out.shape == inputs.q.shape[:4] + inputs.v.shape[-1:]
    assert lse is not None
    assert lse.shape == inputs.q.shape[:4]
    assert difference(before).read_backs == 0


# a graph computes every row up to its bound: of heavy cases that takes seconds
LIGHT = [c for c in CASES if not c.heavy and c.n <= 50]


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}])
@pytest.mark.parametrize("chosen", LIGHT, ids=lambda c: c.name)
def test_captured_work_agrees_with_the_oracle(
    chosen: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = chosen.inputs()
    bound = max((len(inputs.tokens(row)) for row in inputs.rows()), default=0)
    capture(monkeypatch)
    out, lse = sdpa.run(call_of(inputs, max_selected=bound, **options))
    assert_matches_reference(out, lse, inputs)


def test_captured_blocks_need_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    capture(monkeypatch)
    for promise in (None, 0, 100):
        inputs = case("blocks-64").inputs()
        out, lse = sdpa.run(call_of(inputs, max_selected=promise))
        assert_matches_reference(out, lse, inputs)


def test_a_captured_row_that_breaks_its_promise_is_nan_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case("rows-of-very-different-length").inputs()
    capture(monkeypatch)
    out, lse = sdpa.run(call_of(inputs, max_selected=10))
    assert lse is not None
    for row in inputs.rows():
        broken = len(inputs.tokens(row)) > 10
        assert out[row].isnan().all() == broken
        assert lse[row].isnan().all() == broken
        assert out[row].isnan().any() == broken

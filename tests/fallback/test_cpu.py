"""Packed SDPA on the CPU: steps that fit into the cache, parts of a row, whole blocks, the buffer that stays."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel.backends import _cpu, sdpa
from nsa_sel.testing import Inputs, assert_matches_reference
from tests.backends_under_test import backend
from tests.cases import CASES, Case, blocks, case, fixed
from tests.fallback.helpers import call_of, difference


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a part hold 64 tokens and a step hold one part."""
    monkeypatch.setattr(_cpu, "cache_bytes", lambda: 1024)


LIGHT = [c for c in CASES if not c.heavy]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("chosen", LIGHT, ids=lambda c: c.name)
def test_rows_in_parts_agree_with_the_reference(chosen: Case, batch_invariant: bool, small_cache: None) -> None:
    inputs = chosen.inputs()
    out, lse = backend("sdpa").run(inputs, batch_invariant=batch_invariant)
    assert_matches_reference(out, lse, inputs)


def test_a_step_fits_into_the_cache_and_every_thread_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case("", blocks(), B=16, G=4, h=4, Dk=128, Dv=128, S_kv=2048, n=16, block_size=64).inputs()
    seen: list[int] = []
    attention = _cpu._attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> Any:
        seen.append(k.nbytes + v.nbytes)
        assert q.shape[0] % threads == 0
        return attention(q, k, v, **rest)

    monkeypatch.setattr(_cpu, "_attention", spy)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sdpa.run(call_of(inputs))
        assert max(seen) <= threads * _cpu.cache_bytes()
        assert sum(seen) == 16 * 4 * 1024 * 256 * 2
        seen.clear()


@pytest.mark.parametrize(("layout", "whole"), [("contiguous", True), ("tokens_first", False), ("packed", False)])
def test_blocks_are_copied_whole_where_their_tokens_follow_each_other(
    layout: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Case("", blocks(), n=3, block_size=64, S_kv=512, layout=layout).inputs()
    copied: list[int] = []
    select = torch.index_select

    def spy(table: torch.Tensor, dim: int, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        copied.append(table.shape[1])
        return select(table, dim, index, out=out)

    monkeypatch.setattr(torch, "index_select", spy)
    out, lse = sdpa.run(call_of(inputs))
    assert_matches_reference(out, lse, inputs)
    assert set(copied) == {64 * 64 if whole else 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_without_a_token_repeat_one_that_may_be_infinite(dtype: torch.dtype) -> None:
    """0 * inf is NaN: what fills a shorter row up must not show."""
    inputs = Case("", fixed([[[0, 60]], [[70, 75]]]), B=2, G=1, n=1, S_kv=128, dtype=dtype).inputs()
    inputs.v[1, 0, 74, 3] = math.inf
    out, lse = backend("sdpa").run(inputs)
    assert_matches_reference(out, lse, inputs)
    assert (out[1, 0, 0, :, 3] == math.inf).all()


def test_a_row_keeps_its_bits_beside_one_that_breaks_up_the_blocks(small_cache: None) -> None:
    """Beside spans that start anywhere, blocks are copied token by token: the parts must stay the same."""
    spans = [[[0, 64], [128, 256], [320, 384]], [[1, 100], [130, 257], [7, 9]]]
    inputs = Case("", fixed(spans), B=2, G=1, n=3, S_kv=512, dtype=torch.float32, causal=False).inputs()
    out, lse = backend("sdpa").run(inputs, batch_invariant=True)
    for b in (0, 1):
        alone = replace(inputs, **{name: getattr(inputs, name)[b : b + 1] for name in ("q", "k", "v", "ranges")})
        part, part_lse = backend("sdpa").run(alone, batch_invariant=True)
        assert torch.equal(part[0], out[b])
        assert torch.equal(part_lse[0], lse[b])


def test_the_buffer_stays_and_is_bounded() -> None:
    inputs = case("blocks-64").inputs()
    sdpa.run(call_of(inputs))
    kept = _cpu._kept.buffer
    sdpa.run(call_of(inputs))
    assert _cpu._kept.buffer is kept
    many = Case("", fixed([[[0, 900]]]), B=200, G=1, n=1, S_kv=1000, causal=False).inputs()
    sdpa.run(call_of(many, batch_invariant=True))  # one step of more rows than a thread's caches hold
    assert _cpu._kept.buffer.nbytes <= _cpu._KEPT * torch.get_num_threads() * _cpu.cache_bytes()


def test_a_buffer_made_in_inference_mode_serves_outside_of_it() -> None:
    inputs = case("h4").inputs()

    def both_modes() -> None:
        with torch.inference_mode():
            first = nsa_sel.selection_attention(**inputs.arguments())
        assert torch.equal(first, nsa_sel.selection_attention(**inputs.arguments()))

    with ThreadPoolExecutor(1) as fresh:  # a thread without a buffer
        fresh.submit(both_modes).result()


def test_threads_do_not_share_their_buffers() -> None:
    every = [replace(case("blocks-64"), seed=seed).inputs() for seed in range(4)]
    expected = [sdpa.run(call_of(inputs))[0] for inputs in every]

    def again(pair: tuple[Inputs, torch.Tensor]) -> bool:
        return all(torch.equal(sdpa.run(call_of(pair[0]))[0], pair[1]) for _ in range(20))

    before = sdpa.counters()
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(again, zip(every, expected, strict=True)))
    assert difference(before).calls == 80

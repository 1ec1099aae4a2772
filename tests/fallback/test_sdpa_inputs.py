"""Packed SDPA under hostile values and in surroundings that try to change its arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa_sel
from nsa_sel.backends import _pieces, sdpa
from nsa_sel.testing import assert_matches_reference, make_inputs
from tests.backends_under_test import backend
from tests.cases import case
from tests.fallback.helpers import call_of, capture


def test_the_softmax_over_nothing_is_not_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any, scale: float) -> torch.Tensor:
        logits = q @ k.transpose(-1, -2) * scale
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        return torch.softmax(logits, -1) @ v  # NaN where the mask leaves nothing

    monkeypatch.setattr(_pieces, "scaled_dot_product_attention", plain)
    capture(monkeypatch)  # empty rows are computed there, and masked
    inputs = replace(case("empty-rows"), dtype=torch.float32).inputs()
    out, lse = sdpa.run(call_of(inputs))
    assert_matches_reference(out, lse, inputs)


def test_autocast_does_not_reach_inside() -> None:
    inputs = case("dims-64x64-fp32").inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = backend("sdpa").run(inputs)
    assert_matches_reference(out, lse, inputs)


def test_default_dtype_and_device_do_not_reach_inside() -> None:
    inputs = case("pages-16").inputs()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            out, lse = sdpa.run(call_of(inputs))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_matches_reference(out, lse, inputs)


def test_caches_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a strided cache nothing but the selected rows is touched: the rest of this one has no memory behind it."""
    wide = torch.zeros(1, 1, 1, 192).expand(2, 2**30, 3, 192)  # 1.5 TB if anybody copies it
    k, v = wide[..., :64].transpose(1, 2), wide[..., 64:].transpose(1, 2)
    ranges = torch.tensor([[2**30 - 70, 2**30], [5, 9]]).expand(2, 1, 3, 2, 2)
    out = nsa_sel.selection_attention(torch.zeros(2, 1, 3, 4, 64), k, v, ranges)
    assert isinstance(out, torch.Tensor)
    assert not out.any()


edges = st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 30, 31, 32, 33, 2**31 - 1, 2**31, 2**63 - 1])
value = st.one_of(edges, st.integers(-5, 40))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(value, value), max_size=6),
    st.integers(-5, 40),
    st.booleans(),
    st.sampled_from([None, 1, 3, 8]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_hostile_spans(
    pairs: list[tuple[int, int]], seq_len: int, causal: bool, page_size: int | None, dtype: torch.dtype
) -> None:
    ranges = torch.tensor(pairs, dtype=torch.int64).view(1, 1, 1, -1, 2).expand(1, 2, 1, -1, 2)
    inputs = make_inputs(
        ranges=ranges, h=2, Dk=8, Dv=4, S_kv=24, dtype=dtype, seq_lens=[seq_len], page_size=page_size, causal=causal,
        softmax_scale=0.5,
    )  # fmt: skip
    assert_matches_reference(*backend("sdpa").run(inputs), inputs)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(value, max_size=6),
    st.one_of(st.integers(1, 30), st.sampled_from([2**31, 2**62, 2**63 - 1])),
    st.integers(-5, 40),
    st.lists(st.integers(-2, 12), min_size=3, max_size=3),
)
def test_hostile_blocks_and_pages(ids: list[int], size: int, seq_len: int, table: list[int]) -> None:
    indices = torch.tensor(ids, dtype=torch.int64).view(1, 1, 1, -1)
    inputs = make_inputs(
        block_indices=indices, block_size=size, h=2, Dk=8, Dv=4, S_kv=24, dtype=torch.float32, seq_lens=[seq_len]
    )
    assert_matches_reference(*backend("sdpa").run(inputs), inputs)
    pool = torch.randn(10, 1, 8, 8)
    paged = replace(inputs, k=pool, v=pool, block_table=torch.tensor([table], dtype=torch.int32))
    assert_matches_reference(*backend("sdpa").run(paged), paged)

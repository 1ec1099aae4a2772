"""merge_ranges and blocks_to_ranges against sets of tokens, over hostile values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa_sel

EDGES = (-(2**31), -1, 0, 1, 2**31 - 1)
small = st.integers(-4, 24)
any_value = st.one_of(small, st.sampled_from(EDGES))
rows = st.lists(st.tuples(any_value, any_value), max_size=12)


def tokens(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A disjoint, sorted cover by plain interval arithmetic."""
    cover: list[tuple[int, int]] = []
    for start, end in sorted(pair for pair in spans if pair[1] > pair[0]):
        if cover and start <= cover[-1][1]:
            cover[-1] = (cover[-1][0], max(cover[-1][1], end))
        else:
            cover.append((start, end))
    return cover


@settings(max_examples=300, deadline=None)
@given(rows, st.sampled_from([torch.int32, torch.int64]))
def test_merged_spans_are_the_same_tokens_once(spans: list[tuple[int, int]], dtype: torch.dtype) -> None:
    merged = nsa_sel.merge_ranges(torch.tensor(spans, dtype=dtype).view(-1, 2))
    assert merged.dtype == dtype
    assert merged.shape == (len(spans), 2)
    expected = tokens(spans)
    assert merged.tolist() == [list(pair) for pair in expected] + [[0, 0]] * (len(spans) - len(expected))


def test_int64_edges() -> None:
    low, high = -(2**63), 2**63 - 1
    spans = torch.tensor([[5, high], [low, -1], [high, low], [0, 6], [high, high]])
    assert nsa_sel.merge_ranges(spans).tolist() == [[low, -1], [0, high], [0, 0], [0, 0], [0, 0]]


def test_rows_are_merged_apart_and_the_input_stays() -> None:
    spans = torch.tensor([[[[4, 8], [0, 5]], [[9, 1], [2, 3]]]], dtype=torch.int32)
    before = spans.clone()
    assert nsa_sel.merge_ranges(spans).tolist() == [[[[0, 8], [0, 0]], [[2, 3], [0, 0]]]]
    assert torch.equal(spans, before)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0, 2), (0, 5, 2)])
def test_nothing_to_merge(shape: tuple[int, ...]) -> None:
    assert nsa_sel.merge_ranges(torch.zeros(shape, dtype=torch.int32)).shape == shape


def test_merged_selection_gives_attention_over_the_set() -> None:
    q, k, v = torch.randn(1, 1, 1, 2, 8), torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8)
    spans = torch.tensor([[[[[3, 9], [7, 12], [3, 9], [30, 40]]]]])
    once = nsa_sel.selection_attention(q, k, v, nsa_sel.merge_ranges(spans))
    plain = nsa_sel.selection_attention(q, k, v, torch.tensor([[[[[3, 12]]]]]))
    twice = nsa_sel.selection_attention(q, k, v, spans)
    torch.testing.assert_close(once, plain)
    assert not torch.allclose(once, twice), "duplicates count twice"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([[0, 1]], nsa_sel.ArgumentTypeError),
        (torch.zeros(3, 2), nsa_sel.ArgumentTypeError),
        (torch.zeros(3, 3, dtype=torch.int32), nsa_sel.ArgumentError),
        (torch.zeros(2, dtype=torch.int32), nsa_sel.ArgumentError),
    ],
)
def test_merge_ranges_names_bad_input(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"ranges: expected .*, got"):
        nsa_sel.merge_ranges(value)  # type: ignore[arg-type]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8), st.sampled_from([1, 7, 64, 2**40, 2**62, 2**63 - 1]))
def test_blocks_become_their_spans_without_wrapping(ids: list[int], size: int) -> None:
    spans = nsa_sel.blocks_to_ranges(torch.tensor(ids, dtype=torch.int64), size).tolist()
    largest = 2**63 - 1
    for block, (start, end) in zip(ids, spans, strict=True):
        if block < 0:
            assert (start, end) == (0, 0)
        elif (block + 1) * size <= largest:
            assert (start, end) == (block * size, (block + 1) * size)
        else:
            assert 2**62 <= start <= end <= largest, "a block beyond 64 bits came back into reach"


def test_both_ways_of_selecting_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((2, 1, 2, 3, 8), (2, 2, 50, 8), (2, 2, 50, 4)))
    ids = torch.randint(-3, 12, (2, 1, 2, 5), generator=generator, dtype=torch.int32)
    by_blocks = nsa_sel.selection_attention(q, k, v, block_indices=ids, block_size=7)
    by_spans = nsa_sel.selection_attention(q, k, v, nsa_sel.blocks_to_ranges(ids, 7))
    assert torch.equal(by_blocks, by_spans)


@pytest.mark.parametrize(
    ("ids", "size", "error"),
    [
        ([1], 4, nsa_sel.ArgumentTypeError),
        (torch.zeros(1), 4, nsa_sel.ArgumentTypeError),
        (torch.zeros(1, dtype=torch.int32), 0, nsa_sel.ArgumentError),
        (torch.zeros(1, dtype=torch.int32), 4.0, nsa_sel.ArgumentTypeError),
        (torch.zeros(1, dtype=torch.int32), True, nsa_sel.ArgumentTypeError),
    ],
)
def test_blocks_to_ranges_names_bad_input(ids: object, size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"block_(indices|size): expected .*, got"):
        nsa_sel.blocks_to_ranges(ids, size)  # type: ignore[arg-type]

"""The oracle against numbers worked out by hand and against dense attention; no backend is involved."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_sel.reference import selected_tokens, selection_attention_reference


def values(*numbers: float) -> torch.Tensor:
    """V of one request, one group and Dv = 1."""
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1, 1)


def spans(*pairs: tuple[int, int]) -> torch.Tensor:
    """Ranges of one row."""
    return torch.tensor(pairs, dtype=torch.int64).view(1, 1, 1, -1, 2)


Q = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)


def test_equal_logits_average_the_values() -> None:
    out, lse = selection_attention_reference(Q, values(0, 0, 0, 0), values(1, 2, 6, 100), spans((0, 3)))
    assert out.item() == pytest.approx(3.0)
    assert lse.item() == pytest.approx(math.log(3))


def test_weights_follow_the_exponentials_of_scaled_logits() -> None:
    # logits 2 * ln 1 / 2 and 2 * ln 3 / 2: weights 1/4 and 3/4
    keys = values(0.0, math.log(3) / 2)
    out, lse = selection_attention_reference(2 * Q, keys, values(8, 4), spans((0, 2)), softmax_scale=1.0)
    assert out.item() == pytest.approx(8 / 4 + 4 * 3 / 4)
    assert lse.item() == pytest.approx(math.log(4))


def test_default_scale_is_the_root_of_dk() -> None:
    q, k = torch.ones(1, 1, 1, 1, 4), torch.zeros(1, 1, 2, 4)
    k[0, 0, 1] = math.log(3) / 2  # 4 * ln 3 / 2 * 4 ** -0.5 = ln 3
    out, _ = selection_attention_reference(q, k, values(8, 4), spans((0, 2)))
    assert out.item() == pytest.approx(5.0)


def test_a_token_listed_twice_counts_twice() -> None:
    out, lse = selection_attention_reference(Q, values(0, 0), values(3, 9), spans((0, 1), (0, 2)))
    assert out.item() == pytest.approx((3 + 3 + 9) / 3)
    assert lse.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("pairs", [[(0, 0)], [(3, 1)], [(4, 9)], [(-5, 0)], [(2**31 - 1, -(2**31))]])
def test_nothing_selected_gives_zero_and_minus_infinity(pairs: list[tuple[int, int]]) -> None:
    out, lse = selection_attention_reference(Q, values(0, 0, 0, 0), values(1, 2, 3, 4), spans(*pairs))
    assert out.item() == 0
    assert lse.item() == -math.inf


@pytest.mark.parametrize("logits", [(math.inf, 0), (-math.inf, 0), (-math.inf,), (math.inf, -math.inf), (math.nan, 1)])
def test_infinite_logits_as_torch_takes_them(logits: tuple[float, ...]) -> None:
    keys = values(*logits)
    out, lse = selection_attention_reference(Q, keys, torch.ones_like(keys), spans((0, len(logits))))
    expected = torch.logsumexp(keys.flatten(), 0)
    torch.testing.assert_close(lse.flatten()[0], expected, equal_nan=True)
    if lse.item() == -math.inf:
        assert out.item() == 0  # no token has any weight
    else:
        assert out.isnan().item() == torch.softmax(keys.flatten(), 0).isnan().any().item()


def test_no_slots_and_no_tokens() -> None:
    out, lse = selection_attention_reference(Q, values(1), values(1), torch.zeros(1, 1, 1, 0, 2, dtype=torch.int32))
    assert (out.item(), lse.item()) == (0, -math.inf)
    out, lse = selection_attention_reference(Q, values(), values(), spans((0, 5)))
    assert (out.item(), lse.item()) == (0, -math.inf)


def test_spans_are_clamped_to_the_cache() -> None:
    assert selected_tokens([(-(2**63), 2), (3, 2**63 - 1)], kv_len=5) == [0, 1, 3, 4]


def test_tokens_keep_the_order_of_their_spans() -> None:
    assert selected_tokens([(3, 5), (0, 2), (3, 4)], kv_len=9) == [3, 4, 0, 1, 3]


def test_missing_pages_drop_their_tokens() -> None:
    assert selected_tokens([(0, 8)], 8, page_ids=[1, 7, -1, 0], page_size=2, pages=7) == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("causal", "seq_len", "expected"),
    [
        (True, 4, [1, 1.5, 2, 2.5]),  # the last query sees everything, each before it one token less
        (True, 2, [0, 0, 1, 1.5]),  # two queries lie before the first token
        (False, 4, [2.5, 2.5, 2.5, 2.5]),
        (False, 2, [1.5, 1.5, 1.5, 1.5]),
        (True, 99, [1, 1.5, 2, 2.5]),
        (True, -3, [0, 0, 0, 0]),
    ],
)
def test_causal_queries_are_the_last_of_the_sequence(causal: bool, seq_len: int, expected: list[float]) -> None:
    q = torch.ones(1, 4, 1, 1, 1)
    ranges = spans((0, 99)).expand(1, 4, 1, 1, 2)
    lengths = torch.tensor([seq_len], dtype=torch.int32)
    out, _ = selection_attention_reference(
        q, values(0, 0, 0, 0), values(1, 2, 3, 4), ranges, seq_lens=lengths, causal=causal
    )
    assert out.flatten().tolist() == pytest.approx(expected)


def test_blocks_are_spans_of_their_size() -> None:
    ids = torch.tensor([2, -1, 0, 2**62]).view(1, 1, 1, 4)
    out, _ = selection_attention_reference(
        Q, values(*[0] * 6), values(1, 2, 4, 8, 16, 32), block_indices=ids, block_size=2
    )
    assert out.item() == pytest.approx((16 + 32 + 1 + 2) / 4)


def test_pages_are_looked_up() -> None:
    pool = torch.tensor([[30.0, 40.0], [-1.0, -1.0], [10.0, 20.0]], dtype=torch.float64).view(3, 1, 2, 1)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    out, _ = selection_attention_reference(Q, torch.zeros_like(pool), pool, spans((1, 3)), block_table=table)
    assert out.item() == pytest.approx(25.0)


def test_each_row_reads_its_own_request_and_group() -> None:
    q = torch.zeros(2, 1, 2, 1, 1)
    v = torch.arange(8, dtype=torch.float64).view(2, 2, 2, 1)
    ranges = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 2]]).view(2, 1, 2, 1, 2)
    out, _ = selection_attention_reference(q, v, v, ranges)
    assert out.flatten().tolist() == [0.0, 3.0, 4.5, 7.0]
    some, _ = selection_attention_reference(q, v, v, ranges, rows=[(1, 0, 1), (0, 0, 0)])
    assert some.flatten().tolist() == [7.0, 0.0]


def test_one_span_that_covers_everything_is_dense_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 3, 4, 16, dtype=torch.float64, generator=generator)
    k = torch.randn(2, 3, 50, 16, dtype=torch.float64, generator=generator)
    v = torch.randn(2, 3, 50, 8, dtype=torch.float64, generator=generator)
    ranges = torch.tensor([0, 50]).expand(2, 1, 3, 1, 2)
    out, lse = selection_attention_reference(q, k, v, ranges)
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, 0], k, v)  # heads of a group as queries
    torch.testing.assert_close(out[:, 0], dense, rtol=1e-12, atol=1e-12)
    logits = torch.einsum("bghd,bgtd->bght", q[:, 0], k) / 4
    torch.testing.assert_close(lse[:, 0], torch.logsumexp(logits, -1), rtol=1e-12, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    out, lse = selection_attention_reference(Q, values(5000, 4999), values(1, 1), spans((0, 2)))
    assert out.item() == pytest.approx(1.0)
    assert lse.item() == pytest.approx(5000 + math.log1p(math.exp(-1)))

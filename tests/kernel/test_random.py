"""Random calls with hostile range values, and promises about bits: repeatable, batch-invariant, undisturbed."""

from __future__ import annotations

import random

import pytest
import torch

from nsa_sel.testing import assert_matches_reference, make_inputs
from tests import host_run
from tests.host_run import Device, Options, mutation

DIMS = ((64, 64), (64, 128), (128, 64), (128, 128), (192, 128))
HOSTILE = (-(2**31), -7, -1, 0, 1, 2**30, 2**31 - 2, 2**31 - 1)
FAST_CASES, ALL_CASES = 100, 1000


def random_case(seed: int) -> None:
    """One call of any kind against the oracle, under a schedule and a device drawn from the seed."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    B, S, G = pick.randint(1, 3), pick.choice((1, 1, 2, 3)), pick.randint(1, 3)
    Dk, Dv = pick.choice(DIMS)
    h, n, S_kv = (
        pick.choice((1, 2, 5, 8, 13, 16, 24, 48, 64)),
        pick.choice((0, 1, 3, 8, 33, 70)),
        pick.choice((1, 48, 336)),
    )
    blocks = pick.random() < 0.4
    page_size = pick.choice((None, None, 1, 16, 48)) if S_kv > 1 else None
    index = pick.choice((torch.int32, torch.int64))
    block_size = pick.choice((1, 16, 48, 64)) if blocks else None
    if blocks:
        selection = torch.randint(-2, S_kv // block_size + 2, (B, S, G, n), generator=generator)
    else:
        start = torch.randint(-5, S_kv + 5, (B, S, G, n), generator=generator)
        selection = torch.stack([start, start + torch.randint(-4, 60, start.shape, generator=generator)], -1)
    flat = selection.view(-1)
    for _ in range(flat.numel() // 8):  # values that overflow careless arithmetic
        flat[pick.randrange(flat.numel())] = pick.choice(HOSTILE)
    selection = selection.clamp(-(2**31), 2**31 - 1).to(index)
    if not blocks:  # a hostile end may select the whole cache many times over: keep the oracle's work bounded
        selection = selection[:, :, :, :8] if S_kv > 100 else selection
    inputs = make_inputs(
        ranges=None if blocks else selection,
        block_indices=selection if blocks else None,
        block_size=block_size,
        h=h, Dk=Dk, Dv=Dv, S_kv=S_kv, page_size=page_size, seed=seed,
        dtype=pick.choice((torch.float16, torch.bfloat16)),
        seq_lens=[pick.randint(0, S_kv) for _ in range(B)] if pick.random() < 0.5 else None,
        causal=pick.random() < 0.7,
        layout=pick.choice(("contiguous", "tokens_first", "packed")) if page_size is None else "contiguous",
    )  # fmt: skip
    device = pick.choice((Device(), Device(sm_count=1), mutation.H200))
    result = host_run.selection_attention(
        **inputs.arguments(return_lse=True),
        schedule=pick.choice((0, 1)),
        batch_invariant=pick.random() < 0.2,
        options=Options(device=device),
    )
    assert result.findings == []
    assert_matches_reference(result.out, result.lse, inputs)


@pytest.mark.parametrize("first", range(0, FAST_CASES, 10))
def test_random_calls_match_the_oracle(first: int) -> None:
    for seed in range(first, first + 10):
        try:
            random_case(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST_CASES, ALL_CASES, 50))
def test_more_random_calls_match_the_oracle(first: int) -> None:
    for seed in range(first, first + 50):
        try:
            random_case(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("num_splits", [1, 7])
def test_long_selection(num_splits: int) -> None:
    start = torch.arange(0, 65_536, 4096).reshape(1, 1, 1, 16)
    inputs = make_inputs(
        ranges=torch.stack([start, start + 4096], -1), h=4, Dk=64, Dv=64, S_kv=65_536, dtype=torch.bfloat16
    )
    result = host_run.selection_attention(**inputs.arguments(return_lse=True), num_splits=num_splits)
    assert result.findings == []
    assert_matches_reference(result.out, result.lse, inputs)


def test_batch_invariance_bit_for_bit() -> None:
    """A row alone, in a batch of 64, behind padding, in another order: the same bits."""
    torch.manual_seed(2)
    B, G, h, Dk, Dv, S_kv, n = 64, 1, 4, 64, 64, 400, 6
    q = torch.randn(B, 1, G, h, Dk).bfloat16()
    k, v = torch.randn(B, G, S_kv, Dk).bfloat16(), torch.randn(B, G, S_kv, Dv).bfloat16()
    start = torch.randint(0, 300, (B, 1, G, n))
    ranges = torch.stack([start, start + torch.randint(0, 100, start.shape)], -1).int()
    padding = torch.zeros(B, 1, G, 30, 2, dtype=torch.int32)
    order = torch.randperm(B)

    def bits(
        rows: torch.Tensor, spans: torch.Tensor, seq_lens: torch.Tensor | None = None, **device: int
    ) -> torch.Tensor:
        options = Options(kind="fast", check=False, device=Device(**device) if device else Device(sm_count=8))
        run = host_run.selection_attention(
            q[rows], k[rows], v[rows], spans[rows], seq_lens=seq_lens, batch_invariant=True, options=options
        )
        assert run.findings == []
        return run.out

    everyone = torch.arange(B)
    batch = bits(everyone, ranges)
    assert torch.equal(bits(order, ranges), batch[order])
    assert torch.equal(bits(everyone, torch.cat([ranges, padding], 3)), batch)
    for row in (0, 17, 63):
        assert torch.equal(bits(torch.tensor([row]), ranges), batch[row : row + 1])
    lengths = torch.full((B,), S_kv, dtype=torch.int32)
    lengths[1::2] = 0  # the neighbours become padding
    assert torch.equal(bits(everyone, ranges, lengths)[::2], batch[::2])


def test_the_promise_of_max_selected_may_be_broken() -> None:
    start = torch.tensor([[[[0, 100, 200]]], [[[30, 60, 90]]]])
    inputs = make_inputs(
        ranges=torch.stack([start, start + 100], -1), h=16, Dk=128, Dv=128, S_kv=400, dtype=torch.float16
    )
    for bound in (0, 1, 17, 100_000):
        result = host_run.selection_attention(**inputs.arguments(return_lse=True, max_selected=bound))
        assert result.findings == []
        assert_matches_reference(result.out, result.lse, inputs)


@pytest.mark.parametrize("device", [Device(), mutation.H200], ids=["sm80", "sm90"])
@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_nan_of_a_selected_token_comes_through_every_plan(num_splits: int, device: Device) -> None:
    """A split whose logits are all NaN has no maximum, like one without tokens; it must not vanish like one."""
    torch.manual_seed(6)
    q, k, v = torch.randn(1, 1, 1, 5, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    ranges = torch.tensor([[[[[3, 130], [150, 152]]]]])
    for poisoned, rows in ((q[0, 0, 0, 3], [3]), (k[0, 0, 151], [0, 1, 2, 3, 4])):
        kept = poisoned.clone()
        poisoned.fill_(float("nan"))
        run = host_run.selection_attention(
            q.bfloat16(), k.bfloat16(), v.bfloat16(), ranges,
            return_lse=True, num_splits=num_splits, options=Options(device=device),
        )  # fmt: skip
        poisoned.copy_(kept)
        assert run.findings == []
        assert run.lse is not None
        expected = torch.zeros(5, dtype=torch.bool)
        expected[rows] = True
        assert torch.equal(run.out[0, 0, 0].isnan().all(-1), expected)
        assert torch.equal(run.out[0, 0, 0].isnan().any(-1), expected)
        assert torch.equal(run.lse[0, 0, 0].isnan(), expected)

"""What bounds a row beside its spans: counts, rows of the page table; and what asking for lse may not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_sel.testing import assert_matches_reference, make_inputs
from tests import host_run
from tests.host_run import Device, Options, mutation

DEVICES = pytest.mark.parametrize("device", [Device(), mutation.H200], ids=["sm80", "sm90"])
GARBAGE = (-(2**31), -1, 0, 7, 299, 2**31 - 1)


def strided(values: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Every third element of a longer tensor, in which the others would be wrong counts and table rows."""
    wide = torch.full((len(values), 3), 12_345, dtype=torch.int32)
    wide[:, 1] = torch.tensor(values, dtype=torch.int32)
    return wide[:, 1].view(shape)


def garbage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.tensor(GARBAGE)[torch.randint(0, len(GARBAGE), shape, generator=generator)].to(dtype)


@DEVICES
@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("n", [5, 70])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("blocks", [False, True])
def test_slots_behind_a_count_may_hold_anything(
    blocks: bool, index: torch.dtype, n: int, num_splits: int | None, device: Device
) -> None:
    B, S, G, S_kv = 2, 2, 2, 300
    counts = [0, 1, n, n + 9, -4, 2, n - 1, 2**31 - 1]
    used = torch.tensor(counts).clamp(0, n).view(B, S, G, 1) > torch.arange(n)
    generator = torch.Generator().manual_seed(n)
    start = torch.randint(0, S_kv - 8, (B, S, G, n), generator=generator)
    if blocks:
        asked = torch.where(used, start // 4, -1).to(index)
        given = torch.where(used, asked, garbage(asked.shape, index))
        selection: dict[str, Any] = {"block_indices": asked}
    else:
        asked = torch.stack([start, torch.where(used, start + 3, 0)], -1).to(index)
        given = torch.where(used[..., None], asked, garbage(asked.shape, index))
        selection = {"ranges": asked}
    inputs = make_inputs(**selection, block_size=4 if blocks else None, h=3, S_kv=S_kv)
    arguments = inputs.arguments(return_lse=True, counts=strided(counts, (B, S, G)))
    arguments["block_indices" if blocks else "ranges"] = given
    result = host_run.selection_attention(**arguments, num_splits=num_splits, options=Options(device=device))
    assert result.findings == []
    assert_matches_reference(result.out, result.lse, inputs)


def test_long_selections_are_not_read_behind_their_count() -> None:
    """Two rows of 4,096 slots of which 40 are in use: 32 are read with the count, 40 to count tokens, 8 for the map."""
    ranges = torch.zeros(1, 2, 1, 4096, 2, dtype=torch.int32)
    ranges[..., :40, 1] = 1
    inputs = make_inputs(ranges=ranges, h=1, S_kv=8)
    counts = torch.full((1, 2, 1), 40, dtype=torch.int32)
    result = host_run.selection_attention(**inputs.arguments(counts=counts, return_lse=True), num_splits=1)
    assert result.findings == []
    assert result.counters["buffers"]["selection"].bytes_read <= 2 * 80 * 8
    assert_matches_reference(result.out, result.lse, inputs)


@DEVICES
@pytest.mark.parametrize("num_splits", [None, 3])
def test_table_rows_choose_a_row_of_the_page_table(num_splits: int | None, device: Device) -> None:
    """Four rows share a table of six; two of the four lead out of it and select nothing."""
    start = torch.tensor([[0, 40, 77], [5, 60, 90], [1, 2, 3], [4, 5, 6]]).view(4, 1, 1, 3)
    ranges = torch.stack([start, start + 30], -1)
    reached = make_inputs(ranges=ranges, h=4, S_kv=128, page_size=16, seq_lens=[128, 111, 0, 0])
    assert reached.block_table is not None
    table = torch.full((6, reached.block_table.shape[1]), -3, dtype=torch.int32)
    table[5], table[2] = reached.block_table[0], reached.block_table[1]
    given = replace(reached, block_table=table, seq_lens=torch.tensor([128, 111, 128, 128], dtype=torch.int32))
    table_rows = strided([5, 2, -1, 6], (4,))
    result = host_run.selection_attention(
        **given.arguments(return_lse=True, table_rows=table_rows), num_splits=num_splits, options=Options(device=device)
    )
    assert result.findings == []
    assert_matches_reference(result.out, result.lse, reached)


@DEVICES
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_asking_for_lse_does_not_change_the_bits_of_out(batch_invariant: bool, device: Device) -> None:
    start = torch.arange(0, 900, 100).view(1, 1, 1, 9).expand(3, 1, 2, 9)
    inputs = make_inputs(ranges=torch.stack([start, start + 90], -1), h=16, Dk=128, Dv=128, S_kv=1000)
    outs = [
        host_run.selection_attention(
            **inputs.arguments(return_lse=asked, batch_invariant=batch_invariant), options=Options(device=device)
        ).out
        for asked in (False, True)
    ]
    assert torch.equal(outs[0], outs[1])


@DEVICES
@pytest.mark.parametrize("num_splits", [1, 2, 7])
@pytest.mark.parametrize(("token", "value"), [(5, "inf"), (120, "inf"), (295, "inf"), (5, "-inf"), (295, "nan")])
def test_lse_with_an_infinite_logit_is_that_of_torch(token: int, value: str, num_splits: int, device: Device) -> None:
    """All keys are zero but one, whose logit is infinite: in the first, a middle, the last segment."""
    torch.manual_seed(3)
    q = torch.ones(1, 1, 1, 2, 64)
    k, v = torch.zeros(1, 1, 300, 64), torch.randn(1, 1, 300, 64).bfloat16()
    k[0, 0, token, 0] = float(value)
    run = host_run.selection_attention(
        q.bfloat16(), k.bfloat16(), v, torch.tensor([[[[[0, 300]]]]]),
        return_lse=True, num_splits=num_splits, options=Options(device=device),
    )  # fmt: skip
    assert run.findings == []
    assert run.lse is not None
    logits = (q[0, 0, 0] @ k[0, 0].T) * 64**-0.5
    expected = torch.logsumexp(logits, -1)
    assert torch.allclose(run.lse[0, 0, 0], expected, rtol=1e-5, equal_nan=True)
    softmax = torch.softmax(logits, -1) @ v[0, 0].float()
    assert torch.equal(run.out[0, 0, 0].isnan(), softmax.isnan())


# Slots, and tokens of a slot; 9,000 slots are more than the totals that are kept while a row is counted.
@DEVICES
@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize(("n", "size"), [(513, 4), (1025, 1), (2051, 1), (4096, 4), (9000, 1)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("blocks", [False, True])
def test_many_short_spans(blocks: bool, index: torch.dtype, n: int, size: int, num_splits: int, device: Device) -> None:
    generator = torch.Generator().manual_seed(n)
    S_kv = 3 * n * size // 2
    ids = torch.randperm(S_kv // size, generator=generator)[:n].sort().values
    ids[torch.rand(n, generator=generator) < (0.9 if n > 4096 else 0.3)] = -1  # slots that select nothing
    ids[:40] = -1  # the first chunk is empty
    ids = ids.view(1, 1, 1, n).to(index)
    spans = torch.stack([ids * size, ids * size + size], -1).clamp(min=0)
    selection = dict(block_indices=ids, block_size=size) if blocks else dict(ranges=spans)
    inputs = make_inputs(**selection, h=1, Dk=64, Dv=64, S_kv=S_kv, dtype=torch.bfloat16)
    result = host_run.selection_attention(
        **inputs.arguments(return_lse=True), num_splits=num_splits, options=Options(device=device)
    )
    assert result.findings == []
    assert_matches_reference(result.out, result.lse, inputs)

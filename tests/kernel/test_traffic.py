"""Exact counters of the kernel: every selected byte once, 16 bytes a lane, no bank conflicts, no cost with S_kv."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import host_run
from tests.host_run import Device, HostRun, Options, mutation
from tests.host_run.lookahead import assert_next_items_keys_fly_early

DIMS = ((64, 64), (64, 128), (128, 64), (128, 128), (192, 128))
HEADS = (1, 4, 16, 20, 32, 64)


def run(
    h: int, dims: tuple[int, int], *, S_kv: int = 512, spans: torch.Tensor, device: Device | None = None, **more: Any
) -> HostRun:
    """Two requests, two groups."""
    generator = torch.Generator().manual_seed(h + sum(dims))
    B, G = 2, 2
    q = torch.randn(B, 1, G, h, dims[0], generator=generator).bfloat16()
    k = torch.zeros(B, G, S_kv, dims[0], dtype=torch.bfloat16)
    v = torch.zeros(B, G, S_kv, dims[1], dtype=torch.bfloat16)
    options = Options(device=device or Device())
    result = host_run.selection_attention(q, k, v, spans, return_lse=True, options=options, **more)
    assert result.findings == []
    return result


def selected(spans: torch.Tensor, S_kv: int = 512) -> int:
    """Count selected tokens of all rows; one that is listed twice counts twice."""
    return int((spans[..., 1].clamp(max=S_kv) - spans[..., 0]).clamp(min=0).sum())


def disjoint_spans(seed: int, slots: int) -> torch.Tensor:
    """Spans [2, 1, 2, slots, 2] of 0 to 60 tokens at odd places, none overlapping: no sector is met twice."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.arange(slots).mul(61).expand(2, 1, 2, slots) + torch.randint(
        0, 3, (2, 1, 2, slots), generator=generator
    )
    spans = torch.stack([start, start + torch.randint(0, 59, start.shape, generator=generator)], -1)
    return spans[:, :, :, torch.randperm(slots, generator=generator)]


def assert_every_byte_once(result: HostRun, tokens: int, dims: tuple[int, int]) -> None:
    for name, D in zip(("k", "v"), dims, strict=True):
        traffic = result.counters["buffers"][name]
        assert traffic.bytes_read == tokens * D * 2
        assert traffic.read_widths == {16: tokens * D // 8}
        assert traffic.sectors_read * 32 == traffic.bytes_read  # strides and bases are multiples of a sector


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("h", HEADS)
def test_every_selected_byte_once_and_no_conflicts(h: int, dims: tuple[int, int]) -> None:
    spans = disjoint_spans(h, 8)
    result = run(h, dims, spans=spans)
    assert_every_byte_once(result, selected(spans), dims)
    for op in ("LDS", "STS", "LDSM", "LDGSTS_ST"):
        counter = result.counters["ops"][op]
        assert counter.requests > 0
        assert counter.conflicts == 0, (op, [s for s in result.counters["sites"].items() if s[1].conflicts])


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("device", [Device(), mutation.H200], ids=["sm80", "sm90"])
def test_splits_read_every_byte_once_as_well(num_splits: int, device: Device) -> None:
    spans = disjoint_spans(3, 8)
    result = run(16, (192, 128), spans=spans, num_splits=num_splits, device=device)
    assert_every_byte_once(result, selected(spans), (192, 128))
    assert result.counters["plan"]["num_splits"] == num_splits


def test_blocks_and_pages_read_every_byte_once() -> None:
    torch.manual_seed(5)
    B, G, h, page, pages_per_request = 2, 2, 8, 16, 32
    pages = B * pages_per_request
    table = torch.randperm(pages).reshape(B, -1).int()
    q = torch.randn(B, 1, G, h, 128).bfloat16()
    packed = torch.randn(pages, G, page, 256).bfloat16()
    blocks = torch.stack([torch.randperm(pages_per_request * page // 64)[:5] for _ in range(B * G)]).reshape(B, 1, G, 5)
    seq_lens = torch.tensor([500, 512], dtype=torch.int32)
    result = host_run.selection_attention(
        q,
        packed[..., :128],
        packed[..., 128:],
        block_indices=blocks,
        block_size=64,
        block_table=table,
        seq_lens=seq_lens,
    )
    assert result.findings == []
    tokens = sum(
        min(max(int(seq_lens[b]) - 64 * int(i), 0), 64) for b in range(B) for g in range(G) for i in blocks[b, 0, g]
    )
    (kv,) = (t for name, t in result.counters["buffers"].items() if name == "k+v")
    assert kv.bytes_read == tokens * 512
    assert kv.read_widths == {16: tokens * 32}


def test_cost_follows_the_selection_and_not_the_cache() -> None:
    generator = torch.Generator().manual_seed(9)
    start = torch.randint(0, 4000, (2, 1, 2, 7), generator=generator)
    spans = torch.stack([start, start + 64], -1)
    runs = [run(16, (64, 64), S_kv=S_kv, spans=spans, causal=False) for S_kv in (4096, 1_048_576)]
    assert runs[0].counters["ops"] == runs[1].counters["ops"]
    for name in ("k", "v"):
        assert runs[0].counters["buffers"][name].bytes_read == runs[1].counters["buffers"][name].bytes_read
    assert torch.equal(runs[0].out, runs[1].out)


def test_counters_and_bits_do_not_depend_on_the_schedule() -> None:
    for scenario in mutation.SCENARIOS:
        runs = [scenario.run(schedule) for schedule in (0, 1, 2)]
        for other in runs[1:]:
            assert torch.equal(runs[0].out, other.out)
            assert runs[0].counters["ops"] == other.counters["ops"], scenario.name


def test_other_wavefronts_stay_under_two_percent() -> None:
    for scenario in mutation.SCENARIOS:
        sites = scenario.run(0).counters["sites"]
        shared = [c for (op, _, _), c in sites.items() if op in ("LDS", "STS", "LDSM", "LDS_REMOTE", "LDGSTS_ST")]
        assert sum(c.conflicts for c in shared) <= 0.02 * sum(c.wavefronts for c in shared), scenario.name


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("loads", ["cp.async", "bulk"])
def test_next_items_keys_fly_before_the_current_item_ends(loads: str, schedule: int) -> None:
    """The pipeline does not drain between items: one block, two rows, and the trace of what happened when."""
    assert_next_items_keys_fly_early(schedule, loads)


@pytest.mark.parametrize("dims", [(128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("h", [1, 9, 16])
def test_bulk_copies_give_the_same_bits_from_the_same_bytes(h: int, dims: tuple[int, int]) -> None:
    spans = disjoint_spans(h + 7, 8)
    results = {}
    for loads in ("cp.async", "bulk"):
        q = torch.randn(2, 1, 2, h, dims[0], generator=torch.Generator().manual_seed(h)).bfloat16()
        k, v = (torch.randn(2, 2, 512, D, generator=torch.Generator().manual_seed(D)).bfloat16() for D in dims)
        options = Options(device=mutation.H200, loads=loads)
        results[loads] = host_run.selection_attention(q, k, v, spans, return_lse=True, options=options)
        assert results[loads].findings == []
    bulk, threads = results["bulk"], results["cp.async"]
    assert torch.equal(bulk.out, threads.out)
    assert torch.equal(bulk.lse, threads.lse)
    for name, D in zip(("k", "v"), dims, strict=True):
        assert bulk.counters["buffers"][name].bytes_read == selected(spans) * D * 2
    ops = bulk.counters["ops"]
    assert ops["BULK"].bytes == selected(spans) * sum(dims) * 2
    for op in ("LDS", "STS", "LDSM", "LDGSTS_ST"):
        assert ops[op].conflicts == 0


def test_bulk_copies_are_refused_below_sm_90() -> None:
    q, k = torch.zeros(1, 1, 1, 16, 128).bfloat16(), torch.zeros(1, 1, 64, 128).bfloat16()
    with pytest.raises(ValueError, match=r"loads: expected 'cp\.async' below compute capability 9\.0, got 'bulk'"):
        host_run.selection_attention(q, k, k, torch.tensor([[[[[0, 9]]]]]), options=Options(loads="bulk"))

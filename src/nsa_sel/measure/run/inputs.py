"""Inputs of a workload: random tensors and selections, in several variants so that L2 stays cold."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from nsa_sel.measure.run.workload import Workload

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MAX_VARIANTS = 8
ORACLE_ROWS = 64


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call; exactly one of `ranges` and `block_indices` is there."""

    workload: Workload
    q: torch.Tensor  # [B, S, G, h, Dk]
    k: torch.Tensor  # [B, G, S_kv, Dk], paged: [P, G, page_size, Dk]
    v: torch.Tensor  # [B, G, S_kv, Dv], paged: [P, G, page_size, Dv]
    ranges: torch.Tensor | None  # [B, S, G, n, 2] int32
    block_indices: torch.Tensor | None  # [B, S, G, n] int32
    block_table: torch.Tensor | None  # [B, S_kv / page_size] int32

    def selection(self) -> dict[str, Any]:
        """Return the keywords that say what is selected, for `selection_attention` and for the oracle."""
        if self.ranges is not None:
            return {"ranges": self.ranges, "block_table": self.block_table}
        return {
            "block_indices": self.block_indices,
            "block_size": self.workload.block_size,
            "block_table": self.block_table,
        }


def seed_of(workload: Workload, seed: int) -> int:
    """Return the seed of a workload's inputs: the shape and `seed` alone make them again."""
    return zlib.crc32(repr((seed, workload.shape)).encode())


def variants_of(workload: Workload, seed: int, device: torch.device, cold_bytes: int, memory: int) -> list[Inputs]:
    """Return at least two variants of the inputs which together select `cold_bytes`, as far as `memory` bytes allow.

    Variants own their caches while these fit into `memory`; the others share them and select elsewhere in them.
    """
    count = min(max(2, -(-cold_bytes // workload.call_bytes)), MAX_VARIANTS)
    count += count % 2  # two streams take every other one
    caches = max(1, min(count, memory // workload.cache_bytes))
    generator = torch.Generator(device=device).manual_seed(seed_of(workload, seed))
    made: list[Inputs] = []
    for index in range(count):
        shared = made[index % caches] if index >= caches else None
        made.append(_inputs(workload, generator, device, shared))
    return made


def oracle_rows(workload: Workload, seed: int) -> list[tuple[int, int, int]]:
    """Return the rows (b, s, g) that are compared with the oracle: all of them up to 64, else 64 drawn by seed."""
    generator = torch.Generator().manual_seed(seed_of(workload, seed))
    picked = torch.randperm(workload.rows, generator=generator)[:ORACLE_ROWS].tolist()
    per_request = workload.S * workload.G
    return [(row // per_request, row % per_request // workload.G, row % workload.G) for row in sorted(picked)]


def make_ranges(workload: Workload, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Return spans [rows, n, 2] int32 of the workload's distribution, which select exactly L tokens in every row."""
    w, rows = workload, workload.rows
    if w.dist == "few":
        start = torch.randint(0, w.S_kv - w.L + 1, (rows, 1), generator=generator, device=device)
        return torch.stack([start, start + w.L], dim=-1).to(torch.int32)
    if w.dist == "many":
        lengths = torch.full((rows, 8), w.L // 8, device=device)
        return _place(lengths, w.S_kv, generator)
    # mixed: 2, 4 or 8 spans of random lengths that sum to L; the slots left over are empty
    counts = torch.tensor([2, 4, 8], device=device)[torch.randint(0, 3, (rows,), generator=generator, device=device)]
    slots = torch.arange(8, device=device)
    # Distinct cuts in 1..L-1, so that no span is empty: the first counts-1 of a random order, sorted.
    order = torch.rand(rows, w.L - 1, generator=generator, device=device).argsort(dim=1)[:, :7] + 1
    cuts = order.masked_fill(slots[:7] >= (counts - 1)[:, None], w.L).sort(dim=1).values
    edges = torch.cat(
        [torch.zeros(rows, 1, dtype=cuts.dtype, device=device), cuts, torch.full_like(cuts[:, :1], w.L)], dim=1
    )
    return _place(edges.diff(dim=1), w.S_kv, generator)


def make_blocks(workload: Workload, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Return block ids [rows, n] int32 in random order: the first, the last and random others; -1: unused slot."""
    assert workload.block_size is not None
    total = workload.S_kv // workload.block_size
    taken = min(workload.n, total)
    noise = torch.rand(workload.rows, total, generator=generator, device=device)
    noise[:, 0] += 2
    noise[:, -1] += 2
    ids = noise.topk(taken, dim=1).indices
    shuffled = ids.gather(1, torch.rand(ids.shape, generator=generator, device=device).argsort(dim=1))
    unused = torch.full((workload.rows, workload.n - taken), -1, device=device)
    return torch.cat([shuffled, unused], dim=1).to(torch.int32)


def _place(lengths: torch.Tensor, capacity: int, generator: torch.Generator) -> torch.Tensor:
    """Lay spans of the given lengths [rows, n] into [0, capacity) in order, with random gaps of at least one token."""
    rows, n = lengths.shape
    free = capacity - lengths.sum(dim=1, keepdim=True) - (n - 1)
    # Sorted uniform draws in [0, free]: their differences are the gaps, and every gap gets one token more.
    offset = (torch.rand(rows, n, generator=generator, device=lengths.device) * (free + 1)).long().clamp(max=free)
    start = offset.sort(dim=1).values + torch.arange(n, device=lengths.device) + lengths.cumsum(dim=1) - lengths
    return torch.stack([start, start + lengths], dim=-1).to(torch.int32)


def _inputs(workload: Workload, generator: torch.Generator, device: torch.device, shared: Inputs | None) -> Inputs:
    w, dtype = workload, TORCH_DTYPES[workload.dtype]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if shared is not None:
        k, v, table = shared.k, shared.v, shared.block_table
    elif w.page_size is None:
        k, v, table = normal(w.B, w.G, w.S_kv, w.Dk), normal(w.B, w.G, w.S_kv, w.Dv), None
    else:
        pages = w.S_kv // w.page_size
        # One packed pool, as serving systems keep it: K and V are two slices of every row.
        pool = normal(w.B * pages, w.G, w.page_size, w.Dk + w.Dv)
        k, v = pool[..., : w.Dk], pool[..., w.Dk :]
        order = torch.randperm(w.B * pages, generator=generator, device=device)
        table = order.view(w.B, pages).to(torch.int32)
    row = (w.B, w.S, w.G, w.n)
    ranges = blocks = None
    if w.block_size is None:
        ranges = make_ranges(w, generator, device).view(*row, 2)
    else:
        blocks = make_blocks(w, generator, device).view(*row)
    return Inputs(w, normal(w.B, w.S, w.G, w.h, w.Dk), k, v, ranges, blocks, table)

"""Processes of a gloo group: how they start, the part of the cache that each one holds, and what they report."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nsa_sel.distributed import Shard
from nsa_sel.testing import Inputs

PATIENCE = 120.0  # seconds after which ranks that still run are killed and the test fails

Work = Callable[[int, int], Any]  # (rank, world) -> what to report, for torch.save


def run_ranks(work: Work, world: int, folder: Path) -> list[Any]:
    """Run `work` on `world` ranks of a gloo group and return their reports in order; None: it was killed.

    Raises:
        AssertionError: a rank failed, with its traceback; or ranks still ran after PATIENCE.
    """
    context = mp.get_context("spawn")
    processes = [context.Process(target=_rank, args=(work, rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert not late, f"ranks {late} still ran after {PATIENCE} s"
    reports = [_read(folder / f"{rank}.pt") for rank in range(world)]
    failures = [report for report in reports if isinstance(report, _Failure)]
    assert not failures, "\n".join(failure.text for failure in failures)
    return reports


@dataclass(frozen=True)
class _Failure:
    text: str


def _read(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.exists() else None


def _rank(work: Work, rank: int, world: int, folder: Path) -> None:
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up the host's name, which not every machine can
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    # as long as that: on a busy machine the processes come up seconds apart
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE))
    report: Any
    try:
        report = work(rank, world)
    except BaseException:
        report = _Failure(f"rank {rank}: {traceback.format_exc()}")
    torch.save(report, folder / f"{rank}.new")
    (folder / f"{rank}.new").rename(folder / f"{rank}.pt")
    os._exit(0)  # destroying a group whose other ranks are gone may wait for them


def part_of(inputs: Inputs, shard: Shard) -> dict[str, Any]:
    """Return the arguments of a rank's call: of k and v its own tokens alone, in pages of its own if they have any."""
    caches = {"k": inputs.k, "v": inputs.v}
    for name, scale in (("k_scale", inputs.k_scale), ("v_scale", inputs.v_scale)):
        if isinstance(scale, torch.Tensor) and scale.dim() == 3:  # one for each token, spread like its cache
            caches[name] = scale[..., None]
    whole = [cache if inputs.block_table is None else _without_pages(cache, inputs.block_table)
             for cache in caches.values()]  # fmt: skip
    S_kv = whole[0].shape[2]
    tokens = torch.arange(shard.world * shard.tokens)
    own = tokens[tokens // shard.run % shard.world == shard.rank]
    assert len(own) == shard.tokens
    parts = []
    for cache in whole:
        part = cache.new_full((*cache.shape[:2], shard.tokens, cache.shape[3]), torch.nan)
        held = own < S_kv
        part[:, :, held] = cache[:, :, own[held]]
        parts.append(part)
    lengths = inputs.seq_lens
    if S_kv != shard.world * shard.tokens:  # the ranks have more room than the cache
        lengths = torch.full((inputs.q.shape[0],), S_kv, dtype=torch.int32) if lengths is None else lengths
        lengths = lengths.clamp(0, S_kv)
    table = None
    if inputs.block_table is not None:
        page_size = inputs.k.shape[2]
        R, pages = len(inputs.block_table), shard.tokens // page_size
        order = torch.randperm(R * pages + 1, generator=torch.Generator().manual_seed(shard.rank))[: R * pages]
        table = order.view(R, pages).to(torch.int32)
        for i, part in enumerate(parts):
            pool = part.new_full((R * pages + 1, part.shape[1], page_size, part.shape[3]), torch.nan)
            pool[table.long()] = part.view(R, part.shape[1], pages, page_size, -1).transpose(1, 2)
            parts[i] = pool
    spread = dict(zip(caches, parts, strict=True))
    scales = {name: part[..., 0] for name, part in spread.items() if name.endswith("scale")}
    return inputs.arguments() | spread | scales | dict(seq_lens=lengths, block_table=table)


def _without_pages(pool: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the caches [R, G, S_kv, D] that the rows of a page table stand for, NaN where a page is missing."""
    pages = table.long()
    caches = pool[pages.clamp(0, len(pool) - 1)]  # [R, max_pages, G, page_size, D]
    missing = (pages < 0) | (pages >= len(pool))
    caches[missing] = pool.new_full((int(missing.sum()), *pool.shape[1:]), torch.nan)  # float8 has no masked_fill
    return caches.transpose(1, 2).flatten(2, 3)


def room(S_kv: int, rank: int, world: int, interleave: int | None, page_size: int | None = None) -> Shard:
    """Give each rank room for its part of a cache, in whole runs and whole pages."""
    step = (interleave or 1) * (page_size or 1)
    tokens = -(-S_kv // (world * step)) * step
    return Shard(rank, world, interleave or max(tokens, 1), tokens)

"""The clock: what every stage of the kernel costs by the model, found by source function. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tests.machine_code import code
from tests.machine_code.call import Run, selection_attention
from tests.machine_code.native import Model, Program, Stage

# Functions whose clocks make up a stage; an instruction counts for the outermost function below a role's loop.
STAGES: dict[str, Sequence[str]] = {
    "map": ("mapper.map_segment",),
    "load_tile": ("loader.copy_by_threads", "loader.copy_by_engine"),
    "key_tile": ("consumer.compute_logits",),
    "value_tile": ("consumer.accumulate_values",),
    "begin_item": ("consumer.begin_item",),
    "softmax": ("consumer.update_max", "consumer.store_probabilities"),
    "merge": ("decode_kernel.cluster_combine",),
}
CONSUMERS = 4  # warps
SEGMENT = {16: 192}  # tokens of the NSA shape's segment, by head tile
KEYS = (
    *("first_byte", "map_32", "map_32_paged", "load_tile", "key_tile", "value_tile", "begin_item", "softmax"),
    *("merge_cluster", "combine", "chain_b1"),
)


@dataclass(frozen=True)
class Problem:
    """A call at the NSA shape (192/128, 16 heads, bf16, blocks of 64): what of it differs from the plain one."""

    rows: int = 1  # KV groups of one request
    tokens: int = 1024
    page_size: int = 0
    num_splits: int = 1
    arch: str = "sm_90"
    batch_invariant: bool = False
    model: Model = field(default_factory=Model)
    Dk: int = 192
    Dv: int = 128
    h: int = 16
    S_kv: int = 8192
    float8: bool = False  # K and V, with a scale a group

    def run(self, cubin: Path | None = None) -> Run:
        """Run it on the machine; `cubin` holds the decode kernel to take in place of this checkout's."""
        torch.manual_seed(0)
        G, n = self.rows, self.tokens // 64
        q = torch.randn(1, 1, G, self.h, self.Dk).bfloat16()
        k, v = (torch.randn(1, G, self.S_kv, D).bfloat16() for D in (self.Dk, self.Dv))
        blocks = torch.stack([torch.randperm(self.S_kv // 64)[:n] for _ in range(G)]).view(1, 1, G, n).int()
        keywords = {}
        if self.float8:
            k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
            keywords |= {"k_scale": torch.rand(G), "v_scale": torch.rand(G)}

        def programs(kernel: str, arch: str) -> Program:
            return code.with_lines(kernel, arch, cubin if "decode" in kernel else None)

        if self.page_size:
            pages = self.S_kv // self.page_size
            k, v = (x.view(G, pages, self.page_size, -1).transpose(0, 1).contiguous() for x in (k, v))
            keywords["block_table"] = torch.randperm(pages).view(1, pages).int()
        return selection_attention(
            q, k, v, block_indices=blocks, block_size=64, seq_lens=torch.tensor([self.S_kv], dtype=torch.int32),
            return_lse=True, num_splits=self.num_splits, batch_invariant=self.batch_invariant, arch=self.arch,
            model=self.model, programs=programs, **keywords,
        )  # fmt: skip


def total(run: Run, stage: str) -> Stage:
    """Add up a stage's functions over all warps of the decode kernel."""
    found = [s for name, s in run.decode.stages.items() if name in STAGES[stage]]
    return Stage(*(sum(getattr(s, f) for s in found) for f in ("busy", "stalled", "slept", "issued", "entered")))


def clocks(run: Run, stage: str) -> float:
    """Clocks of a stage without the time asleep at barriers, over all warps."""
    found = total(run, stage)
    return found.busy + found.stalled


def tiles(tokens: int, rows: int) -> int:
    """Tiles of a row: the last one of a segment may be short."""
    segment = SEGMENT[16]
    return sum(-(-min(segment, tokens - first) // rows) for first in range(0, tokens, segment))


def measure(arch: str, cubin: Path | None = None, float8: bool = False) -> dict[str, float]:
    """Return the model's clocks of every stage on one instruction set, by the names in `KEYS`.

    Stages are a warp's own, alone on its SM (no other warp takes slots or ports), everything in L2. `first_byte` and
    `chain_b1` have all warps; the chain finds K and V in DRAM.
    """
    alone = Problem(arch=arch, model=Model(contention=False), float8=float8)
    row, paged = alone.run(cubin), replace(alone, page_size=64).run(cubin)
    segments = -(-alone.tokens // SEGMENT[16])
    maps = -(-alone.tokens // 32)
    warm = Problem(arch=arch, float8=float8).run(cubin)
    chain = Problem(arch=arch, rows=4, num_splits=0, model=Model(cold=1), float8=float8).run(cubin)
    split = Problem(arch=arch, num_splits=8, batch_invariant=True, float8=float8).run(cubin)
    combine = split.combine.end if split.combine else 0
    merge = combine  # where there are no clusters, the second kernel merges
    if chain.plan["cluster"] > 1:
        merge = clocks(chain, "merge") / (chain.plan["grid"] * 6)
    key_tiles, value_tiles = tiles(alone.tokens, 64), tiles(alone.tokens, 96)
    return {
        "first_byte": warm.decode.marks["copy of k"],
        "map_32": clocks(row, "map") / maps,
        "map_32_paged": clocks(paged, "map") / maps,
        "load_tile": clocks(row, "load_tile") / (key_tiles + value_tiles),
        "key_tile": clocks(row, "key_tile") / CONSUMERS / key_tiles,
        "value_tile": clocks(row, "value_tile") / CONSUMERS / value_tiles,
        "begin_item": clocks(row, "begin_item") / CONSUMERS,
        "softmax": clocks(row, "softmax") / CONSUMERS / segments,
        "merge_cluster": merge,
        "combine": combine,
        "chain_b1": chain.clocks,
    }

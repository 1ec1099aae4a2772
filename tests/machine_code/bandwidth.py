"""The bandwidth page of the model: what share of a GPU's memory bandwidth a launch would reach. Nothing is measured.

One block (or cluster) of the planned launch, the one with most items, runs on the machine with every K and V line from
DRAM and its share of the bandwidth as its link: bandwidth / blocks, at most what one SM can draw. So bytes in flight
against latency, the start of a block, its softmax, its tail and the waves of items are the machine code's own. Left
out: what two blocks of one SM take from each other beside the link, uneven SMs, DRAM efficiency below the figure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch

from nsa_sel.facts import GPUS, Gpu
from tests.host_run.abi import Device
from tests.machine_code.call import selection_attention
from tests.machine_code.clock import Problem
from tests.machine_code.native import Model

BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)
H200 = next(gpu for gpu in GPUS if gpu.name == "H200")
A100 = next(gpu for gpu in GPUS if gpu.name == "A100")
MODELLED = (replace(H200, name="H100", bandwidth=3.35e12, source="datasheet, SXM"), H200, A100)


@dataclass(frozen=True)
class Shape:
    """A model's selection at decode: groups, heads, dims, blocks of so many tokens, tokens selected by a row."""

    name: str
    G: int
    h: int
    Dk: int
    Dv: int
    block_size: int
    L: int
    float8: bool = False

    def bytes_per_row(self) -> int:
        """Of K and V."""
        return self.L * (self.Dk + self.Dv) * (1 if self.float8 else 2)


SHAPES = (Shape("NSA", 4, 16, 192, 128, 64, 1024), Shape("M3", 4, 16, 128, 128, 128, 2048))


def share(shape: Shape, B: int, gpu: Gpu) -> float:
    """Return the model's share of the bandwidth that one call reaches; 1.0 is bytes of K and V / bandwidth."""
    torch.manual_seed(0)
    S_kv, n = 8192, shape.L // shape.block_size
    q = torch.randn(B, 1, shape.G, shape.h, shape.Dk).bfloat16()
    k, v = (torch.randn(1, 1, S_kv, D).bfloat16().expand(B, shape.G, -1, -1) for D in (shape.Dk, shape.Dv))
    if shape.float8:
        k, v = (x[:1, :1].to(torch.float8_e4m3fn).expand(B, shape.G, -1, -1) for x in (k, v))
    blocks = torch.rand(B, 1, shape.G, S_kv // shape.block_size).argsort(-1)[..., :n].int()
    device = Device(gpu.sm_count, gpu.capability, gpu.smem_per_block, gpu.smem_per_sm)
    per_clock = gpu.bandwidth / gpu.clock
    arguments = {"block_indices": blocks, "block_size": shape.block_size, "causal": False, "clusters": 1}
    arch = "sm_90" if gpu.capability >= 90 else "sm_80"
    planned = selection_attention(q, k, v, **arguments, arch=arch, device=device)
    model = Model(bytes_per_clock=min(per_clock / planned.plan["grid"], Model().bytes_per_clock), cold=3)
    run = selection_attention(q, k, v, **arguments, arch=arch, device=device, model=model)
    split = planned.plan["split_rows"] > 0 and planned.plan["cluster"] == 1
    clocks = run.clocks + (_combine(arch) if split else 0)
    return B * shape.G * shape.bytes_per_row() / per_clock / clocks


def _combine(arch: str) -> float:
    run = Problem(arch=arch, num_splits=8, batch_invariant=True).run()
    return run.combine.end if run.combine else 0.0


def main(float8: bool = False) -> None:
    """Print the page, and its figures as one line of JSON; `float8`: K and V of one byte an element."""
    print("model: share of the memory bandwidth (K and V bytes / bandwidth / the model's time)")
    figures: dict[str, dict[str, dict[int, float]]] = {}
    for gpu in MODELLED:
        print(f"\n{gpu.name}, {gpu.bandwidth / 1e12:.2f} TB/s ({gpu.source})")
        print(f"{'shape':<8}" + "".join(f"{f'B={B}':>8}" for B in BATCHES))
        for shape in (replace(s, float8=float8) for s in SHAPES):
            row = {B: round(share(shape, B, gpu), 3) for B in BATCHES}
            figures.setdefault(gpu.name, {})[shape.name] = row
            print(f"{shape.name:<8}" + "".join(f"{value:>8.0%}" for value in row.values()), flush=True)
    print(json.dumps(figures))

"""A call of `selection_attention` on the machine: tensors in, planned by the package's planner, every block run."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsa_sel.backends._request import DTYPES, LOADS
from tests.host_run.abi import Device, limits_of
from tests.host_run.kernel import buffers_of, describe
from tests.machine_code import code
from tests.machine_code.code import Instance
from tests.machine_code.native import Memory, Model, Result, launch, library

DEVICES = {
    "sm_80": Device(sm_count=108, capability=80, smem_per_block=166_912, smem_per_sm=167_936),  # A100
    "sm_90": Device(sm_count=132, capability=90, smem_per_block=232_448, smem_per_sm=233_472),  # H100, H200
}


class Planned(ctypes.Structure):
    """Mirror of `PlannedLaunch` in machine/plan_host.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("dtype", "Dk", "Dv", "head_tile", "loads", "grid", "cluster", "threads", "shared_bytes", "num_slots"),
            *("num_splits", "workspace_floats", "combine_grid", "combine_threads", "decode_bytes", "combine_bytes"),
        )
    ]

    def instance(self) -> Instance:
        """The decode kernel that the planner chose."""
        return Instance(DTYPES[self.dtype], self.Dk, self.Dv, self.head_tile, LOADS[self.loads])


@dataclass(frozen=True)
class Run:
    """What a call gave.

    Args:
        out: [B, S, G, h, Dv] in v's dtype.
        lse: [B, S, G, h] fp32, None unless asked for.
        clocks: model: of the slowest block, and of the second kernel behind it.
        counts: warp instructions that ran, by opcode, over all blocks of the launch.
        decode, combine: each grid's own figures; `combine` is None where there was no second kernel.
        plan: of the launch.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    clocks: int
    counts: Counter[str]
    decode: Result
    combine: Result | None
    plan: dict[str, int]


def selection_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    *,
    num_splits: int = 0,
    arch: str = "sm_90",
    device: Device | None = None,
    model: Model | None = None,
    loads: str = "cp.async",
    cubin: Path | None = None,
    **keywords: Any,
) -> Run:
    """Run the decode kernel's machine code on CPU tensors; other arguments as in `nsa_sel.selection_attention`.

    Args:
        num_splits: blocks per row; 0 lets the planner choose.
        arch: "sm_80" or "sm_90", whose machine code runs.
        device: what the planner sees; an A100 or H100 by default.
        model: what the clock assumes.
        loads: "cp.async", or "bulk": the experimental instances of sm_90.
        cubin: a decode kernel compiled elsewhere, in place of this package's.

    Raises:
        MachineCodeError: the machine code did what it must not.
        NotImplementedError, ValueError: what the kernel does not take, as the emulator.
    """
    if arch not in DEVICES:
        raise ValueError(f"arch: expected one of {sorted(DEVICES)}, got {arch!r}")
    call = describe(q, k, v, ranges, num_splits=num_splits, loads=loads, **keywords)
    planned = plan(call.request, device or DEVICES[arch])
    workspace = torch.full((max(planned.workspace_floats, 0),), math.nan, dtype=torch.float32)
    decode = ctypes.create_string_buffer(planned.decode_bytes)
    combine = ctypes.create_string_buffer(planned.combine_bytes)
    library().machine_parameters(workspace.data_ptr() if workspace.numel() else None, decode, combine)
    memory = Memory()
    tensors = call.tensors | ({"workspace": (workspace, True)} if workspace.numel() else {})
    for name, start, end, writable in buffers_of(tensors):
        memory.add(name, start, end - start, writable)
    first, second = Result(), None
    if planned.grid:
        first = launch(
            code.program(planned.instance(), arch, cubin),
            memory,
            decode.raw,
            grid=planned.grid,
            cluster=planned.cluster,
            threads=planned.threads,
            shared_bytes=planned.shared_bytes,
            model=model,
        )
    if planned.combine_grid:
        second = launch(
            code.program(Instance(planned.instance().dtype), arch),
            memory,
            combine.raw,
            grid=planned.combine_grid,
            threads=planned.combine_threads,
            model=model,
        )
    counts = Counter(first.counts) + Counter(second.counts if second else {})
    clocks = round(first.end + (second.end if second else 0))
    figures = {name: getattr(planned, name) for name, _ in Planned._fields_}
    return Run(call.out, call.lse, clocks, counts, first, second, figures)


def plan(request: bytes, device: Device) -> Planned:
    """Return what the package's planner makes of a request.

    Raises:
        ValueError: what it refuses.
    """
    lib, planned, message = library(), Planned(), ctypes.create_string_buffer(512)
    if lib.machine_request_bytes() != len(request):
        raise RuntimeError(f"request: expected {lib.machine_request_bytes()} bytes, got {len(request)}")
    limits = limits_of(device)
    refused = lib.machine_plan(request, ctypes.byref(limits), ctypes.byref(planned), message, len(message))
    if refused:
        raise ValueError(message.value.decode())
    return planned

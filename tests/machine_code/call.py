"""A call of `selection_attention` on the machine: tensors in, planned by the package's planner, every block run."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.host_run.abi import Device, limits_of
from tests.host_run.kernel import buffers_of, describe
from tests.machine_code import code
from tests.machine_code.native import Memory, Model, Program, Result, launch, library

DEVICES = {
    "sm_80": Device(sm_count=108, capability=80, smem_per_block=166_912, smem_per_sm=167_936),  # A100
    "sm_90": Device(sm_count=132, capability=90, smem_per_block=232_448, smem_per_sm=233_472),  # H100, H200
}


class _Plan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("grid", "num_slots", "full_rows", "split_rows", "num_splits", "cluster", "workspace_floats")
    ]


class _Grid(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("parameters", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "grid", "threads", "shared_bytes", "cluster")),
    ]


@dataclass(frozen=True)
class Run:
    """What a call gave.

    Args:
        out: [B, S, G, h, Dv] in v's dtype.
        lse: [B, S, G, h] fp32, None unless asked for.
        clocks: model: of the slowest block of each grid, added up.
        counts: warp instructions that ran for at least one lane, by opcode, over all blocks and grids.
        grids: each grid's own figures by kernel, in the order of their launches.
        plan: of the launch.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    clocks: int
    counts: Counter[str]
    grids: dict[str, Result]
    plan: dict[str, int]

    @property
    def decode(self) -> Result:
        """Figures of the decode kernel."""
        return next(iter(self.grids.values()))

    @property
    def combine(self) -> Result | None:
        """Figures of the second kernel, where there was one."""
        return next((r for name, r in self.grids.items() if "combine" in name), None)


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
    programs: Callable[[str, str], Program] = code.program,
    limit: int = 10**10,
    clusters: int = 0,
    **keywords: Any,
) -> Run:
    """Run the decode kernel's machine code on CPU tensors; other arguments as in `nsa_sel.selection_attention`.

    Args:
        num_splits: blocks per row; 0 lets the planner choose.
        arch: "sm_80" or "sm_90", whose machine code runs.
        device: what the planner sees; an A100 or H100 by default.
        model: what the clock assumes.
        loads: "cp.async", or "bulk": the experimental instances of sm_90.
        programs: gives the machine code of a kernel on an instruction set; the installed package's by default.
        limit: of instructions, beyond which a grid counts as endless.
        clusters: run only so many of the first grid's clusters (blocks where there are none), for the clock; the
            results are then not whole.

    Raises:
        MachineCodeError: the machine code did what it must not.
        NotImplementedError, ValueError: what the kernel does not take, as the emulator.
    """
    if arch not in DEVICES:
        raise ValueError(f"arch: expected one of {sorted(DEVICES)}, got {arch!r}")
    call = describe(q, k, v, ranges, num_splits=num_splits, loads=loads, **keywords)
    figures = plan(call.request, device or DEVICES[arch])
    workspace = torch.full((figures["workspace_floats"],), math.nan, dtype=torch.float32)
    memory = Memory()
    tensors = call.tensors | ({"workspace": (workspace, True)} if workspace.numel() else {})
    for name, start, end, writable in buffers_of(tensors):
        memory.add(name, start, end - start, writable)
    results = {}
    for index in range(library().machine_grids(workspace.data_ptr() if workspace.numel() else None)):
        grid = _Grid()
        library().machine_grid(index, ctypes.byref(grid))
        name = grid.kernel.decode()
        results[name] = launch(
            programs(name, arch),
            memory,
            ctypes.string_at(grid.parameters, grid.bytes),
            grid=grid.grid,
            cluster=grid.cluster,
            threads=grid.threads,
            shared_bytes=grid.shared_bytes,
            model=model,
            limit=limit,
            clusters=clusters,
        )
        if clusters:
            break
    counts = sum((Counter(r.counts) for r in results.values()), Counter())
    clocks = round(sum(r.end for r in results.values()))
    return Run(call.out, call.lse, clocks, counts, results, figures)


def plan(request: bytes, device: Device) -> dict[str, int]:
    """Return what the package's planner makes of a request.

    Raises:
        ValueError: what it refuses.
    """
    lib, planned, message = library(), _Plan(), ctypes.create_string_buffer(512)
    if lib.machine_request_bytes() != len(request):
        raise RuntimeError(f"request: expected {lib.machine_request_bytes()} bytes, got {len(request)}")
    limits = limits_of(device)
    if lib.machine_plan(request, ctypes.byref(limits), ctypes.byref(planned), message, len(message)):
        raise ValueError(message.value.decode())
    return {name: getattr(planned, name) for name, _ in _Plan._fields_}

"""The kernel on the emulator: a checked call to the planner, its buffers to the emulator, results back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nsa_sel.backends import cuda
from nsa_sel.backends._request import DTYPES, cache_of, pack
from nsa_sel.call import Call
from nsa_sel.check import check
from tests.host_run.abi import ROOT, Device, instances, library, plan_call
from tests.host_run.emulator import Emulator


@dataclass(frozen=True)
class Options:
    """What a test may ask of the emulator beside the call itself.

    Args:
        kind: "hook" (every plain access checked), "fast" (none) or "asan".
        check: shadow memory and happens-before on; off for speed.
        drop: (kind, file, line) of a synchronisation to leave out.
        trace: record the order of loads and MMAs.
        seed: of schedule 2.
        loads: "cp.async", or "bulk": the experimental instances of sm_90.
        root: where cuda/, cpp/ and tests/host_run/kernel_host.cpp are; a changed copy for mutants.
    """

    kind: str = "hook"
    check: bool = True
    drop: tuple[str, str, int] | None = None
    trace: bool = False
    seed: int = 1
    loads: str = "cp.async"
    device: Device = field(default_factory=Device)
    root: Path = ROOT


@dataclass
class HostRun:
    """One run of the kernel on the CPU.

    Args:
        out: [B, S, G, h, Dv] in v's dtype.
        lse: [B, S, G, h] fp32, None unless asked for.
        findings: what the emulator found wrong, one line each; empty for a clean run.
        counters: "ops" per instruction class, "buffers" per tensor, "plan" of the launch, "sites", "sync_sites",
            "trace".
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    findings: list[str]
    counters: dict[str, Any]


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """Return the address range [start, end) that a tensor's elements lie in."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def buffers_of(tensors: dict[str, tuple[torch.Tensor, bool]]) -> list[tuple[str, int, int, bool]]:
    """Return (name, start, end, writable); views of one allocation that interleave (packed K and V) are one buffer."""
    spans: list[tuple[str, int, int, bool]] = []
    for name, (tensor, writable) in tensors.items():
        start, end = _extent(tensor)
        if start == end:
            continue
        for i, (other, s, e, w) in enumerate(spans):
            if start < e and s < end:
                spans[i] = (f"{other}+{name}", min(s, start), max(e, end), w or writable)
                break
        else:
            spans.append((name, start, end, writable))
    return spans


def register(emulator: Emulator, tensors: dict[str, tuple[torch.Tensor, bool]]) -> None:
    """Register tensors as the emulator's buffers."""
    for name, start, end, writable in buffers_of(tensors):
        emulator.register(name, start, end - start, writable=writable, tracked=writable)


@dataclass
class Prepared:
    """One planned call with everything that its pointers point to; `launch` runs it or records it into a stream.

    Args:
        out: [B, S, G, h, Dv] in v's dtype.
        lse: [B, S, G, h] fp32, None unless asked for.
        workspace: fp32 partials of the splits, empty where none are needed. May be replaced before a launch.
        plan: of the launch.
        tensors: by name, and whether the kernel writes them; without the workspace.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    workspace: torch.Tensor
    plan: dict[str, int]
    tensors: dict[str, tuple[torch.Tensor, bool]]
    options: Options
    request: bytes

    def buffers(self) -> dict[str, tuple[torch.Tensor, bool]]:
        """All tensors by name, and whether the kernel writes them."""
        return self.tensors | ({"workspace": (self.workspace, True)} if self.workspace.numel() else {})

    def launch(self) -> int:
        """Launch, or record into the stream that was begun last; the buffers have to be registered. Returns a code."""
        _, lib = library(self.options.kind, self.options.root)
        plan_call(lib, self.request, self.options.device)
        return lib.nsa_launch(self.workspace.data_ptr() if self.workspace.numel() else None)


@dataclass
class Described:
    """A call as the planner takes it, with everything that its pointers point to.

    Args:
        call: as the package's own check made it.
        request: the bytes that the package's binding hands to the planner.
        tensors: by name, and whether the kernel writes them; without the workspace.
    """

    call: Call
    request: bytes
    out: torch.Tensor
    lse: torch.Tensor | None
    tensors: dict[str, tuple[torch.Tensor, bool]]


def describe(
    *arguments: Any, backend: str = "cuda", num_splits: int | None = None, loads: str = "cp.async", **keywords: Any
) -> Described:
    """Return the request of a call on CPU tensors; arguments as in `nsa_sel.selection_attention`.

    What is planned is what ships: the arguments go through the package's own check, and the call through the bytes that
    its binding reads.

    Args:
        num_splits: blocks per row; None lets the planner choose.
        loads: "cp.async", or "bulk": the experimental instances of sm_90.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is wrong.
        NotImplementedError: what the kernel does not take (other dtypes, unaligned strides).
    """
    if backend not in ("auto", "cuda"):
        raise ValueError(f"backend: expected 'auto' or 'cuda' (the emulator runs the CUDA kernel), got {backend!r}")
    call = check(*arguments, **keywords)
    why = f"no kernel takes {call.dtype}" if call.dtype not in DTYPES else cuda.kernel_limits(call)
    if why is not None:
        raise NotImplementedError(why)
    shape = (call.B, call.S, call.G, call.h)
    out = call.out if call.out is not None else torch.empty((*shape, call.Dv), dtype=call.q.dtype)
    lse = torch.empty(shape, dtype=torch.float32) if call.return_lse else None
    read = {"q": call.q, "k": call.k, "v": call.v, "selection": call.selection, "counts": call.counts}
    read |= {"seq_lens": call.seq_lens, "block_table": call.block_table, "table_rows": call.table_rows}
    read |= {"k_scale": call.k_scale, "v_scale": call.v_scale}
    buffers = {name: (t, False) for name, t in read.items() if t is not None} | {"out": (out, True)}
    if lse is not None:
        buffers["lse"] = (lse, True)
    return Described(call, pack(call, out, lse, num_splits or 0, loads), out, lse, buffers)


def prepare(*arguments: Any, options: Options | None = None, **keywords: Any) -> Prepared:
    """Plan a call of the decode kernel on the CPU; arguments as `describe`.

    Raises:
        NotImplementedError: what the kernel does not take (other dtypes, dims, heads, unaligned strides).
        ValueError: what the planner refuses.
    """
    options = options or Options()
    described = describe(*arguments, loads=options.loads, **keywords)
    call, table = described.call, instances(options.kind, options.root)
    wanted = (call.dtype, call.Dk, call.Dv, cache_of(call))
    if not any((*i[:3], i[5]) == wanted and call.h <= i[3] for i in table):
        raise NotImplementedError(f"no kernel compiled for {call.dtype} Dk={call.Dk} Dv={call.Dv} h={call.h}")
    _, lib = library(options.kind, options.root)
    plan = plan_call(lib, described.request, options.device)
    workspace = torch.full((max(plan["workspace_floats"], 0),), math.nan, dtype=torch.float32)
    return Prepared(described.out, described.lse, workspace, plan, described.tensors, options, described.request)


def selection_attention(*arguments: Any, schedule: int = 0, options: Options | None = None, **keywords: Any) -> HostRun:
    """Run the decode kernel on the CPU; arguments as in `nsa_sel.selection_attention`, and those of `prepare`.

    Args:
        schedule: 0 ascending with copies as late as possible, 1 descending with copies as early as possible, 2 random.

    Raises:
        NotImplementedError, ValueError: as `prepare`.
    """
    options = options or Options()
    prepared = prepare(*arguments, options=options, **keywords)
    emulator, _ = library(options.kind, options.root)
    emulator.unregister_all()
    register(emulator, prepared.buffers())
    emulator.reset(schedule, options.check, options.seed, options.trace)
    if options.drop is not None:
        emulator.drop(*options.drop)
    code = prepared.launch()
    findings = emulator.findings()
    if code != 0:
        findings.append(f"launch: expected code 0, got {code}")
    counters: dict[str, Any] = {
        "ops": emulator.counters(),
        "buffers": emulator.buffers(),
        "sites": emulator.sites(),
        "sync_sites": emulator.sync_sites(),
        "plan": prepared.plan,
    }
    if options.trace:
        counters["trace"] = emulator.trace()
    return HostRun(prepared.out, prepared.lse, findings, counters)

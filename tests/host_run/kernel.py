"""Binding of the kernel on the emulator: tensors to a `DecodeRequest`, buffers to the emulator, results back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.host_run.abi import DTYPES, LOADS, POINTERS, ROOT, Device, Request, instances, library, plan_call
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


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"q, k, v: the kernel takes fp16 or bf16, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.numel() and (
            t.stride(-1) != 1
            or t.data_ptr() % 16
            or any(s % 8 for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1)
        ):
            raise NotImplementedError(f"{name}: the kernel takes 16-byte aligned rows, got strides {t.stride()}")


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
    request: Request

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
        tensors: by name, and whether the kernel writes them; without the workspace.
    """

    request: Request
    out: torch.Tensor
    lse: torch.Tensor | None
    tensors: dict[str, tuple[torch.Tensor, bool]]


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    *,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    counts: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
    causal: bool = True,
    max_selected: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "cuda",
    num_splits: int | None = None,
    loads: str = "cp.async",
) -> Described:
    """Return the request of a call on CPU tensors; arguments as in `nsa_sel.selection_attention`.

    Args:
        num_splits: blocks per row; None lets the planner choose.
        loads: "cp.async", or "bulk": the experimental instances of sm_90.

    Raises:
        NotImplementedError: what the kernel does not take (other dtypes, unaligned strides).
    """
    if backend not in ("auto", "cuda"):
        raise ValueError(f"backend: expected 'auto' or 'cuda' (the host run is the CUDA kernel), got {backend!r}")
    if (ranges is None) == (block_indices is None):
        raise ValueError("ranges, block_indices: expected exactly one of the two")
    _check(q, k, v)
    B, S, G, h, Dk = q.shape
    Dv = v.shape[3]
    selection = ranges if ranges is not None else block_indices
    assert selection is not None
    if ranges is not None and ranges.stride(-1) != 1:
        selection = ranges.contiguous()
    n = selection.shape[3]
    page_size = k.shape[2] if block_table is not None else 0
    S_kv = block_table.shape[1] * page_size if block_table is not None else k.shape[2]
    if max_selected is None and block_indices is not None:
        max_selected = n * int(block_size or 0)
    result = out if out is not None else torch.empty((B, S, G, h, Dv), dtype=v.dtype)
    lse = torch.empty((B, S, G, h), dtype=torch.float32) if return_lse else None
    request = Request(
        **{name: t.data_ptr() if t is not None else None for name, t in zip(
            POINTERS, (q, k, v, selection, counts, seq_lens, block_table, table_rows, result, lse), strict=True)},
        dtype=DTYPES[q.dtype], B=B, S=S, G=G, h=h, Dk=Dk, Dv=Dv, S_kv=S_kv, n=n,
        page_size=page_size, num_pages=k.shape[0] if block_table is not None else 0,
        num_tables=block_table.shape[0] if block_table is not None else 0,
        block_size=int(block_size or 0) if block_indices is not None else 0,
        index_is_64=selection.dtype == torch.int64, causal=causal,
        max_selected=-1 if max_selected is None else max_selected,
        batch_invariant=batch_invariant, num_splits=num_splits or 0, loads=LOADS.index(loads),
        q_strides=q.stride()[:4], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        out_strides=result.stride()[:4], sel_strides=selection.stride()[:4],
        counts_strides=counts.stride() if counts is not None else (0, 0, 0),
        seq_lens_stride=seq_lens.stride(0) if seq_lens is not None else 0,
        table_stride=block_table.stride(0) if block_table is not None else 0,
        table_rows_stride=table_rows.stride(0) if table_rows is not None else 0,
        scale=Dk**-0.5 if softmax_scale is None else softmax_scale,
    )  # fmt: skip
    buffers = {
        "q": (q, False),
        "k": (k, False),
        "v": (v, False),
        "selection": (selection, False),
        "out": (result, True),
    }
    optional = {"counts": counts, "seq_lens": seq_lens, "block_table": block_table, "table_rows": table_rows}
    buffers.update({name: (t, False) for name, t in optional.items() if t is not None})
    if lse is not None:
        buffers["lse"] = (lse, True)
    return Described(request, result, lse, buffers)


def prepare(*arguments: Any, options: Options | None = None, **keywords: Any) -> Prepared:
    """Plan a call of the decode kernel on the CPU; arguments as `describe`.

    Raises:
        NotImplementedError: what the kernel does not take (other dtypes, dims, heads, unaligned strides).
        ValueError: what the planner refuses.
    """
    options = options or Options()
    call = describe(*arguments, loads=options.loads, **keywords)
    r = call.request
    if not any(i[1:3] == (r.Dk, r.Dv) and 1 <= r.h <= i[3] for i in instances(options.kind, options.root)):
        raise NotImplementedError(f"no compiled instance for Dk={r.Dk}, Dv={r.Dv}, h={r.h}")
    _, lib = library(options.kind, options.root)
    plan = plan_call(lib, r, options.device)
    workspace = torch.full((max(plan["workspace_floats"], 0),), math.nan, dtype=torch.float32)
    return Prepared(call.out, call.lse, workspace, plan, call.tensors, options, r)


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

"""Binding of the kernel on the emulator: tensors to a `DecodeRequest`, buffers to the emulator, results back."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.host_run import build
from tests.host_run.emulator import Emulator

ROOT = Path(__file__).resolve().parents[2]
_DTYPES = {torch.float16: 0, torch.bfloat16: 1}  # enum Dtype in cpp/params.h
_POINTERS = ("q", "k", "v", "selection", "seq_lens", "block_table", "out", "lse")
_SIZES = ("dtype", "B", "S", "G", "h", "Dk", "Dv", "S_kv", "n", "page_size", "num_pages", "block_size", "index_is_64")
_FLAGS = ("causal", "max_selected", "batch_invariant", "num_splits")


class _Request(ctypes.Structure):
    """Mirror of `DecodeRequest` in cpp/dispatch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES + _FLAGS),
        ("q_strides", ctypes.c_int64 * 4),
        ("k_strides", ctypes.c_int64 * 3),
        ("v_strides", ctypes.c_int64 * 3),
        ("out_strides", ctypes.c_int64 * 4),
        ("sel_strides", ctypes.c_int64 * 4),
        ("seq_lens_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "grid",
            "blocks_per_sm",
            "num_slots",
            "smem_bytes",
            "full_rows",
            "split_rows",
            "num_splits",
            "cluster",
            "workspace_floats",
        )
    ]


class _Limits(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("sm_count", "capability", "smem_per_block", "smem_per_sm")]


@dataclass(frozen=True)
class Device:
    """The GPU that planning sees. Few SMs by default, so that persistent blocks walk over several items."""

    sm_count: int = 2
    capability: int = 80
    smem_per_block: int = 166_912
    smem_per_sm: int = 167_936


@dataclass(frozen=True)
class Options:
    """What a test may ask of the emulator beside the call itself.

    Args:
        kind: "hook" (every plain access checked), "fast" (none) or "asan".
        check: shadow memory and happens-before on; off for speed.
        drop: (kind, file, line) of a synchronisation to leave out.
        trace: record the order of loads and MMAs.
        seed: of schedule 2.
    """

    kind: str = "hook"
    check: bool = True
    drop: tuple[str, str, int] | None = None
    trace: bool = False
    seed: int = 1
    device: Device = field(default_factory=Device)


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


@functools.cache
def library(kind: str) -> tuple[Emulator, Any]:
    """Build (first call) and load the kernel's sources: the very files in cuda/ and cpp/."""
    kernels = [*sorted((ROOT / "cuda").glob("instances/*.cu")), ROOT / "cuda" / "run.cu"]
    host = [*sorted((ROOT / "cpp").glob("*.cpp")), Path(__file__).with_name("kernel_host.cpp")]
    path = build.library(kind, [*kernels, *host], include_dirs=[ROOT / "cuda", ROOT / "cpp"])
    emulator = Emulator(path)
    lib = emulator.lib
    lib.nsa_prepare.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int]
    lib.nsa_launch.argtypes = [ctypes.c_void_p]
    lib.nsa_request_bytes.restype = ctypes.c_int64
    if lib.nsa_request_bytes() != ctypes.sizeof(_Request):
        raise RuntimeError(f"DecodeRequest: expected {lib.nsa_request_bytes()} bytes, got {ctypes.sizeof(_Request)}")
    return emulator, lib


def instances(kind: str = "hook") -> set[tuple[str, int, int, int]]:
    """Return the compiled kernels as (dtype, Dk, Dv, head tile)."""
    _, lib = library(kind)
    found = set()
    for i in range(lib.nsa_num_instances()):
        key = (ctypes.c_int64 * 4)()
        lib.nsa_instance(i, key)
        found.add((("float16", "bfloat16")[key[0]], key[1], key[2], key[3]))
    return found


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """Return the address range [start, end) that a tensor's elements lie in."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _register(emulator: Emulator, tensors: dict[str, tuple[torch.Tensor, bool]]) -> None:
    """Register tensors; views of one allocation that interleave (packed K and V) become one buffer with both names."""
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
    for name, start, end, writable in spans:
        emulator.register(name, start, end - start, writable=writable, tracked=writable)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"q, k, v: the kernel takes fp16 or bf16, got {q.dtype}, {k.dtype}, {v.dtype}")
    dims = (q.shape[4], v.shape[3], q.shape[3])
    if not any(i[1:3] == dims[:2] and 1 <= dims[2] <= i[3] for i in instances()):
        raise NotImplementedError(f"no compiled instance for Dk={dims[0]}, Dv={dims[1]}, h={dims[2]}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.numel() and (t.stride(-1) != 1 or t.data_ptr() % 16 or any(s % 8 for s in t.stride()[:-1])):
            raise NotImplementedError(f"{name}: the kernel takes 16-byte aligned rows, got strides {t.stride()}")


def selection_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    *,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    max_selected: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "cuda",
    num_splits: int | None = None,
    schedule: int = 0,
    options: Options | None = None,
) -> HostRun:
    """Run the decode kernel on the CPU; arguments as in `nsa_sel.selection_attention`.

    Args:
        num_splits: blocks per row; None lets the planner choose for `options.device`.
        schedule: 0 ascending with copies as late as possible, 1 descending with copies as early as possible, 2 random.

    Raises:
        NotImplementedError: what the kernel does not take (other dtypes, dims, heads, unaligned strides).
        ValueError: what the planner refuses.
    """
    options = options or Options()
    if backend not in ("auto", "cuda"):
        raise ValueError(f"backend: expected 'auto' or 'cuda' (the host run is the CUDA kernel), got {backend!r}")
    if (ranges is None) == (block_indices is None):
        raise ValueError("ranges, block_indices: expected exactly one of the two")
    _check(q, k, v)
    emulator, lib = library(options.kind)
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
    request = _Request(
        **{name: t.data_ptr() if t is not None else None for name, t in zip(
            _POINTERS, (q, k, v, selection, seq_lens, block_table, result, lse), strict=True)},
        dtype=_DTYPES[q.dtype], B=B, S=S, G=G, h=h, Dk=Dk, Dv=Dv, S_kv=S_kv, n=n,
        page_size=page_size, num_pages=k.shape[0] if block_table is not None else 0,
        block_size=int(block_size or 0) if block_indices is not None else 0,
        index_is_64=selection.dtype == torch.int64, causal=causal,
        max_selected=-1 if max_selected is None else max_selected,
        batch_invariant=batch_invariant, num_splits=num_splits or 0,
        q_strides=q.stride()[:4], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        out_strides=result.stride()[:4], sel_strides=selection.stride()[:4],
        seq_lens_stride=seq_lens.stride(0) if seq_lens is not None else 0,
        table_stride=block_table.stride(0) if block_table is not None else 0,
        scale=Dk**-0.5 if softmax_scale is None else softmax_scale,
    )  # fmt: skip
    device = options.device
    limits = _Limits(device.sm_count, device.capability, device.smem_per_block, device.smem_per_sm)
    plan = _Plan()
    message = ctypes.create_string_buffer(512)
    if lib.nsa_prepare(ctypes.byref(request), ctypes.byref(limits), ctypes.byref(plan), message, len(message)) != 0:
        raise ValueError(message.value.decode())
    workspace = torch.full((max(plan.workspace_floats, 0),), math.nan, dtype=torch.float32)
    buffers = {
        "q": (q, False),
        "k": (k, False),
        "v": (v, False),
        "selection": (selection, False),
        "out": (result, True),
    }
    optional = {"seq_lens": seq_lens, "block_table": block_table}
    buffers.update({name: (t, False) for name, t in optional.items() if t is not None})
    if lse is not None:
        buffers["lse"] = (lse, True)
    if workspace.numel():
        buffers["workspace"] = (workspace, True)

    emulator.unregister_all()
    _register(emulator, buffers)
    emulator.reset(schedule, options.check, options.seed, options.trace)
    if options.drop is not None:
        emulator.drop(*options.drop)
    code = lib.nsa_launch(workspace.data_ptr() if workspace.numel() else None)
    findings = emulator.findings()
    if code != 0:
        findings.append(f"launch: expected code 0, got {code}")
    counters: dict[str, Any] = {
        "ops": emulator.counters(),
        "buffers": emulator.buffers(),
        "sites": emulator.sites(),
        "sync_sites": emulator.sync_sites(),
        "plan": {name: getattr(plan, name) for name, _ in _Plan._fields_},
    }
    if options.trace:
        counters["trace"] = emulator.trace()
    return HostRun(result, lse, findings, counters)

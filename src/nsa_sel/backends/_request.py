"""A checked call as the bytes of a `DecodeRequest` (cpp/dispatch.h): what the binding and the emulator both read."""

from __future__ import annotations

import struct

import torch

from nsa_sel.call import Call

DTYPES = ("float16", "bfloat16")  # enum Dtype in cpp/params.h
LOADS = ("cp.async", "bulk")  # enum Loads
MOST = 2**31 - 64  # of anything that the kernel counts in 32 bits and steps by 32
CACHES = ("same", "float8_e4m3fn")  # enum Cache
POINTERS = (
    *("q", "k", "v", "selection", "counts", "seq_lens", "block_table", "table_rows", "out", "lse"),
    *("k_scale", "v_scale"),
)

# Name and number of 64-bit values of every member, in order; whoever loads the compiled code compares it with the
# table there, so that a member added on one side alone fails at import and not at the first call.
FIELDS: tuple[tuple[str, int], ...] = (
    *((name, 1) for name in POINTERS),
    ("dtype", 1), ("B", 1), ("S", 1), ("G", 1), ("h", 1), ("Dk", 1), ("Dv", 1), ("S_kv", 1), ("n", 1),
    ("page_size", 1), ("num_pages", 1), ("num_tables", 1), ("block_size", 1), ("index_is_64", 1), ("causal", 1),
    ("max_selected", 1), ("batch_invariant", 1), ("num_splits", 1), ("loads", 1),
    ("cache", 1), ("k_scale_per_token", 1), ("v_scale_per_token", 1),
    ("q_strides", 4), ("k_strides", 3), ("v_strides", 3), ("out_strides", 4), ("sel_strides", 4), ("counts_strides", 3),
    ("seq_lens_stride", 1), ("table_stride", 1), ("table_rows_stride", 1),
    ("k_scale_strides", 3), ("v_scale_strides", 3), ("scale", 1), ("v_factor", 1),
)  # fmt: skip
_LAYOUT = struct.Struct(f"={sum(count for _, count in FIELDS) - 2}q2d")


def cache_of(call: Call) -> str:
    """Return what k and v hold, as in `CACHES`."""
    return CACHES[call.fp8]


def pack(
    call: Call, out: torch.Tensor, lse: torch.Tensor | None, num_splits: int = 0, loads: str = "cp.async"
) -> bytes:
    """Return the request of a call; it holds addresses, so the tensors must live until the launch has run.

    Args:
        call: a checked call of a dtype that the kernel takes.
        out: [B, S, G, h, Dv], 8-byte aligned rows.
        lse: [B, S, G, h] fp32 contiguous, or None.
        num_splits: blocks per row; 0 lets the planner choose.
        loads: "cp.async", or "bulk" for the experimental instances of sm_90.
    """
    selection, counts, lengths = call.selection, call.counts, call.seq_lens
    table, table_rows = call.block_table, call.table_rows
    k_scale, v_scale = call.k_scale, call.v_scale
    return _LAYOUT.pack(
        call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr(), selection.data_ptr(),
        0 if counts is None else counts.data_ptr(), 0 if lengths is None else lengths.data_ptr(),
        0 if table is None else table.data_ptr(), 0 if table_rows is None else table_rows.data_ptr(),
        out.data_ptr(), 0 if lse is None else lse.data_ptr(),
        0 if k_scale is None else k_scale.data_ptr(), 0 if v_scale is None else v_scale.data_ptr(),
        DTYPES.index(call.dtype), call.B, call.S, call.G, call.h, call.Dk, call.Dv, call.S_kv, call.n,
        call.page_size, call.num_pages, call.num_tables, call.block_size, selection.dtype is torch.int64, call.causal,
        -1 if call.max_selected is None else min(call.max_selected, MOST),
        call.batch_invariant, num_splits, LOADS.index(loads), CACHES.index(cache_of(call)),
        k_scale is not None and k_scale.dim() == 3, v_scale is not None and v_scale.dim() == 3,
        *call.q.stride()[:4], *call.k.stride()[:3], *call.v.stride()[:3], *out.stride()[:4], *selection.stride()[:4],
        *((0, 0, 0) if counts is None else counts.stride()),
        0 if lengths is None else lengths.stride(0), 0 if table is None else table.stride(0),
        0 if table_rows is None else table_rows.stride(0),
        *call.scale_strides(k_scale), *call.scale_strides(v_scale), call.scale, call.v_factor,
    )  # fmt: skip


def pack_fields(**values: int | float | tuple[int, ...]) -> bytes:
    """Return a request of the named members, the others 0: for planning without tensors."""
    flat: list[int | float] = []
    for name, count in FIELDS:
        value = values.pop(name, (0,) * count)
        flat.extend(value if isinstance(value, tuple) else (value,))
    if values:
        raise TypeError(f"pack_fields: expected members of a request, got {sorted(values)}")
    return _LAYOUT.pack(*flat)

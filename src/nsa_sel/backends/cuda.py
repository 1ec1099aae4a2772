"""The compiled CUDA kernel: takes a checked call's pointers and strides to `_core` and allocates what it writes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nsa_sel import _build
from nsa_sel.errors import KernelLaunchError, PlanError
from nsa_sel.problem import Call, Problem

core: Any = _build.core
_DTYPES = {"float16": 0, "bfloat16": 1}  # enum Dtype in cpp/params.h
_OUT_ALIGNMENT = 8  # bytes: merged splits are written four 16-bit columns at once
_MOST = 2**31 - 64  # of anything that the kernel counts in 32 bits and steps by 32


@functools.cache
def device_limits(index: int) -> Any:
    """Return the `_core.DeviceLimits` of a GPU."""
    return core.device_limits(index)


def unavailable(problem: Problem) -> str | None:
    """Say what the kernel itself cannot take; dtype, dims, heads and alignment are looked at by routing before."""
    for name in ("S_kv", "n", "num_pages"):
        if getattr(problem, name) > _MOST:
            return f"{name} is {getattr(problem, name)}, the kernel takes up to {_MOST}"
    return None


def plan(
    call: Call, out: torch.Tensor, lse: torch.Tensor | None, limits: Any, num_splits: int = 0, loads: str = "cp.async"
) -> Any:
    """Return the `_core.DecodeLaunch` of a call; its tensors must live until it has run.

    Args:
        call: a checked call.
        out: [B, S, G, h, Dv], 8-byte aligned rows.
        lse: [B, S, G, h] fp32 contiguous, or None.
        limits: of the device, `_core.DeviceLimits`.
        num_splits: blocks per row; 0 lets the planner choose.
        loads: "cp.async", or "bulk" for the experimental instances of sm_90.
    """
    p = call.problem
    selection = call.ranges if call.ranges is not None else call.block_indices
    assert selection is not None
    try:
        return core.DecodeLaunch(
            device=limits,
            dtype=_DTYPES[p.dtype],
            shape=(p.B, p.S, p.G, p.h, p.Dk, p.Dv, p.S_kv, p.n),
            pointers=(
                call.q.data_ptr(),
                call.k.data_ptr(),
                call.v.data_ptr(),
                selection.data_ptr(),
                0 if call.seq_lens is None else call.seq_lens.data_ptr(),
                0 if call.block_table is None else call.block_table.data_ptr(),
                out.data_ptr(),
                0 if lse is None else lse.data_ptr(),
            ),
            q_strides=call.q.stride()[:4],
            k_strides=call.k.stride()[:3],
            v_strides=call.v.stride()[:3],
            out_strides=out.stride()[:4],
            sel_strides=selection.stride()[:4],
            list_strides=(
                0 if call.seq_lens is None else call.seq_lens.stride(0),
                0 if call.block_table is None else call.block_table.stride(0),
            ),
            pages=(p.page_size, p.num_pages) if p.paged else (0, 0),
            # a block longer than the cache covers it, and every other one starts behind it
            block_size=min(call.block_size or 0, max(p.S_kv, 1)),
            index_is_64=p.index_bits == 64,
            causal=call.causal,
            scale=call.scale,
            max_selected=-1 if call.max_selected is None else min(call.max_selected, _MOST),
            batch_invariant=call.batch_invariant,
            num_splits=num_splits,
            loads=loads,
        )
    except ValueError as error:
        raise PlanError(str(error)) from None


def _row_aligned(out: torch.Tensor) -> bool:
    step = _OUT_ALIGNMENT // out.element_size()
    return (
        out.data_ptr() % _OUT_ALIGNMENT == 0 and all(s % step == 0 for s in out.stride()[:-1]) and out.stride(-1) == 1
    )


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the kernel on the current stream; no host synchronisation, no allocation besides out, lse and workspace.

    Returns:
        out [B, S, G, h, Dv] in v's dtype; lse [B, S, G, h] fp32 or None.

    Raises:
        PlanError: strides that reach beyond 2^32 row offsets, or more than 2^31 work items.
        KernelLaunchError: the device refused the launch and can go on (the caller may fall back).
        RuntimeError: any other CUDA error: a lost context, a broken capture, no memory.
    """
    p = call.problem
    device = call.q.device
    with torch.cuda.device(device):
        target = call.out
        if target is None or not _row_aligned(target):
            out = torch.empty((p.B, p.S, p.G, p.h, p.Dv), dtype=call.v.dtype, device=device)
        else:
            out = target
        lse = torch.empty((p.B, p.S, p.G, p.h), dtype=torch.float32, device=device) if call.return_lse else None
        if out.numel() > 0:
            launch = plan(call, out, lse, device_limits(device.index))
            workspace = None
            if launch.workspace_floats > 0:
                workspace = torch.empty(launch.workspace_floats, dtype=torch.float32, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
            code = launch.run(0 if workspace is None else workspace.data_ptr(), device.index, stream)
            if code != 0:
                message = f"decode kernel on {torch.cuda.get_device_name(device)}: {core.error_string(code)}"
                raise KernelLaunchError(message) if core.is_refusal(code) else RuntimeError(message)
        if target is not None and target is not out:
            target.copy_(out)
            out = target
        return out, lse

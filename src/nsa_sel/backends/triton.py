"""The Triton backend, for research: it runs where it is asked for by name, or where NSA_SEL_TRITON lets it.

Triton itself is imported by the first call that looks at this backend, never by `import nsa_sel`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nsa_sel.call import Call
from nsa_sel.check import check
from nsa_sel.devices import DeviceInfo
from nsa_sel.errors import ArgumentError, KernelLaunchError

_DTYPES = ("float16", "bfloat16")
_MAX_HEADS = 64  # beyond, the result of a row does not fit a block's registers
_MAX_DIMS = 256
_SPANS = 32  # spans that are packed into tiles together
_MAX_TOKENS = 2**31 // _SPANS  # their lengths add up in 32 bits, and each may be the whole cache
_LOG2_E = 1.4426950408889634
_CAPABILITY = (8, 0)
# What the driver says of a launch that it refused; after any other error the context may be lost.
_REFUSALS = (
    "invalid argument",
    "invalid configuration",
    "invalid device function",
    "no kernel image is available",
    "out of memory",
    "out of resources",
    "too many resources",
)


@dataclass(frozen=True)
class Config:
    """How a kernel is launched; the defaults were chosen by registers and shared memory, not measured.

    All but `num_stages` are powers of two. The columns of v are one block: they are accumulated in registers.

    Raises:
        ArgumentError: a value that no kernel can have.
    """

    block_tokens: int = 64  # tokens of a tile, at least 16
    block_dims: int = 64  # columns of q and k that one step of the product takes, at least 16
    num_warps: int = 4
    num_stages: int = 2  # tiles in flight: 2 is double buffering

    def __post_init__(self) -> None:
        for name, least in (("block_tokens", 16), ("block_dims", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ArgumentError(f"{name}: expected a power of two >= {least}, got {value}")
        if self.num_stages < 1:
            raise ArgumentError(f"num_stages: expected an int >= 1, got {self.num_stages}")


_config: contextvars.ContextVar[Config] = contextvars.ContextVar("nsa_sel_triton_config", default=Config())  # noqa: B039


@contextlib.contextmanager
def using(config: Any) -> Iterator[None]:
    """Run every call inside with `config`, a `Config` or anything with its attributes."""
    wanted = Config(config.block_tokens, config.block_dims, config.num_warps, config.num_stages)
    token = _config.set(wanted)
    try:
        yield
    finally:
        _config.reset(token)


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Return the kernels, or why there are none."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    try:
        return importlib.import_module("nsa_sel.backends._triton_kernels"), None
    except (ImportError, AttributeError, RuntimeError, OSError) as error:  # a Triton too old, or broken
        return None, f"triton cannot be used: {error}"


def limits(call: Call, device: DeviceInfo | None) -> str | None:
    """Say why this backend cannot take `call`, or None."""
    kernels, why = _load()
    if kernels is None:
        return why
    if kernels.INTERPRETED:
        if call.device_type != "cpu":
            return f"under TRITON_INTERPRET=1 triton takes CPU tensors, not tensors on {call.device_type}"
        if (why := interpreter_fault()) is not None:
            return why
    elif call.device_type != "cuda":
        what = f"tensors on {call.device_type}"
        return f"triton takes CUDA tensors, or CPU tensors under TRITON_INTERPRET=1, not {what}"
    elif device is None or device.capability < _CAPABILITY:
        found = "an unknown one" if device is None else ".".join(map(str, device.capability))
        return f"triton takes compute capability 8.0 or newer, not {found}"
    if call.dtype not in _DTYPES:
        return f"triton takes float16 and bfloat16, not {call.dtype}"
    if call.requires_grad:
        return "gradients required"
    if (why := call.unreadable()) is not None:
        return why
    for name, most in (("h", _MAX_HEADS), ("Dk", _MAX_DIMS), ("Dv", _MAX_DIMS), ("S_kv", _MAX_TOKENS - 1)):
        if getattr(call, name) > most:
            return f"triton takes {name} up to {most}, not {getattr(call, name)}"
    for name in ("rows", "n", "num_pages", "num_tables"):
        if getattr(call, name) >= 2**31 - _SPANS:
            return f"triton takes {name} below {2**31 - _SPANS}, not {getattr(call, name)}"
    return None


@functools.cache
def interpreter_fault() -> str | None:
    """Try the interpreter once: versions of Triton and NumPy that do not fit each other fail at the first load."""
    q = torch.ones((1, 1, 1, 1, 16), dtype=torch.bfloat16)
    call = check(q, q[0], q[0], torch.tensor([[[[[0, 1], [0, 1]]]]], dtype=torch.int32))
    try:
        kernel, arguments = launch(call, torch.empty_like(q), None, Config(16, 16))
        kernel[(1,)](**arguments)
    except Exception as error:  # Triton wraps whatever NumPy raises into a type of its own
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("triton", "numpy"))
        return f"Triton's interpreter fails with {versions}: {error}"
    return None


def run(call: Call, config: Config | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a kernel on the current stream; no host synchronisation, no allocation besides out and lse.

    Args:
        call: a checked call that `limits` has nothing against.
        config: how to launch; None: as `using` says, else the defaults.

    Returns:
        out [B, S, G, h, Dv] in q's dtype; lse [B, S, G, h] fp32 or None.

    Raises:
        KernelLaunchError: the launch was refused, as where a configuration takes too much shared memory.
        RuntimeError: any other CUDA error; every later call may fail as well.
    """
    p = call
    shape = (p.B, p.S, p.G, p.h)
    out = call.out if call.out is not None else call.q.new_empty((*shape, p.Dv))
    lse = torch.empty(shape, dtype=torch.float32, device=call.q.device) if call.return_lse else None
    if not out.numel():
        return out, lse
    kernel, arguments = launch(call, out, lse, config or _config.get())
    with torch.cuda.device(call.q.device) if call.q.is_cuda else contextlib.nullcontext():
        try:
            kernel[(p.rows,)](**arguments)
        except Exception as error:
            if _refused(error):
                name = torch.cuda.get_device_name(call.q.device) if call.q.is_cuda else "the CPU"
                raise KernelLaunchError(f"triton kernel {kernel.__name__} on {name}: {error}") from error
            raise
    return out, lse


def _refused(error: Exception) -> bool:
    """Whether nothing was launched and the context can go on."""
    errors = importlib.import_module("triton.runtime.errors")
    if isinstance(error, (errors.OutOfResources, errors.PTXASError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _REFUSALS)


def launch(call: Call, out: torch.Tensor, lse: torch.Tensor | None, config: Config) -> tuple[Any, dict[str, Any]]:
    """Return the kernel of a call and its keyword arguments; the grid is one program a row.

    Args:
        call: a checked call.
        out: [B, S, G, h, Dv], any strides, its last dimension contiguous.
        lse: [B, S, G, h] fp32 contiguous, or None.
        config: how to launch.
    """
    kernels, why = _load()
    assert kernels is not None, why
    p = call
    selection = call.selection
    kernel = kernels.dense if p.n == 1 else kernels.varlen
    return kernel, {
        "q": call.q,
        "k": call.k.view(torch.uint8) if p.fp8 else call.k,
        "v": call.v.view(torch.uint8) if p.fp8 else call.v,
        "selection": selection,
        "counts": call.counts,
        "seq_lens": call.seq_lens,
        "table": call.block_table,
        "table_rows": call.table_rows,
        "k_scale": call.k_scale,
        "v_scale": call.v_scale,
        "out": out,
        "lse": lse,
        "q_strides": call.q.stride()[:4],
        "k_strides": call.k.stride()[:3],
        "v_strides": call.v.stride()[:3],
        "sel_strides": selection.stride()[:4],
        "out_strides": out.stride()[:4],
        "counts_strides": (0, 0, 0) if call.counts is None else call.counts.stride(),
        "seq_stride": 0 if call.seq_lens is None else call.seq_lens.stride(0),
        "table_strides": (0, 0) if call.block_table is None else call.block_table.stride(),
        "table_rows_stride": 0 if call.table_rows is None else call.table_rows.stride(0),
        "k_scale_strides": call.scale_strides(call.k_scale),
        "v_scale_strides": call.scale_strides(call.v_scale),
        "S": p.S,
        "G": p.G,
        "h": p.h,
        "S_kv": p.S_kv,
        "n": p.n,
        "num_pages": p.num_pages,
        "num_tables": p.num_tables,
        "block_size": p.block_size,
        "scale": call.scale * _LOG2_E,
        "v_factor": call.v_factor,
        "DK": p.Dk,
        "DV": p.Dv,
        "PAGE_SIZE": p.page_size,
        "BLOCKS": p.block_indices is not None,
        "CAUSAL": p.causal,
        "H": _padded(p.h),
        "N": config.block_tokens,
        "D": min(config.block_dims, _padded(p.Dk)),
        "E": _padded(p.Dv),
        "C": min(_SPANS, max(2, _power_of_two(p.n))),
        "FP8": p.fp8,
        "INTERPRETED": kernels.INTERPRETED,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # said outright: versions of Triton differ in the default
    }


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _padded(value: int) -> int:
    """Return the extent of a matrix operand that holds `value`: tensor cores take 16 at the least."""
    return max(16, _power_of_two(value))

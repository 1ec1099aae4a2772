"""Tensors to a `Call`: every argument is checked here, and an error names it, what was expected and what came.

The good case is a handful of comparisons per tensor; texts are put together only when something is wrong.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from nsa_sel import _overlap, devices
from nsa_sel.call import Call
from nsa_sel.errors import ArgumentError, ArgumentTypeError, AutogradError

DTYPE_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
_FLOATS = tuple(DTYPE_NAMES)
_FP8 = torch.float8_e4m3fn
_CACHES = {dtype: (dtype, _FP8) if dtype.itemsize == 2 else (dtype,) for dtype in _FLOATS}  # of k, by q's dtype
_INDICES = (torch.int32, torch.int64)
_COUNTS = (torch.int32,)
_MOST_TOKENS = 2**62  # sums of two token ids stay in 64 bits


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    counts: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
    causal: bool = True,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    max_selected: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
) -> Call:
    """Check every argument of `selection_attention` (its shapes and dtypes) and return the call.

    Raises:
        ArgumentError: a shape, stride, device or value is wrong.
        ArgumentTypeError: a type or dtype is wrong.
        AutogradError: gradients are required and `out` is given.
    """
    if not isinstance(q, torch.Tensor) or q.layout is not torch.strided:
        raise _not_a_tensor("q", q)
    dtype, device = q.dtype, q.device
    if dtype not in DTYPE_NAMES or q.dim() != 5:
        raise _mismatch("q", q, _FLOATS, "[B, S, G, h, Dk]")
    B, S, G, h, Dk = q.shape
    if not (G and h and Dk):
        raise _mismatch("q", q, _FLOATS, "[B, S, G >= 1, h >= 1, Dk >= 1]")
    if q.stride()[-1] != 1 and Dk > 1:
        raise _not_contiguous("q", q)

    if block_table is None:
        _require("k", k, _CACHES[dtype], (B, G, None, Dk), ("B", "G", "S_kv", "Dk"), device)
        S_kv = k.shape[2]
        _require("v", v, (k.dtype,), (B, G, S_kv, None), ("B", "G", "S_kv", "Dv"), device)
        page_size = num_pages = num_tables = 0
    else:
        _require("k", k, _CACHES[dtype], (None, G, None, Dk), ("P", "G", "page_size", "Dk"), device)
        num_pages, _, page_size, _ = k.shape
        _require("v", v, (k.dtype,), (num_pages, G, page_size, None), ("P", "G", "page_size", "Dv"), device)
        if page_size < 1:
            raise _mismatch("k", k, (k.dtype,), "[P, G, page_size >= 1, Dk]")
        tables, letter = (B, "B") if table_rows is None else (None, "R")
        _require("block_table", block_table, _COUNTS, (tables, None), (letter, "max_pages"), device)
        num_tables = block_table.shape[0]
        S_kv = block_table.shape[1] * page_size
        if S_kv > _MOST_TOKENS:
            raise ArgumentError(f"block_table: expected max_pages * page_size <= 2^62 tokens, got {S_kv}")
    if table_rows is not None:
        if block_table is None:
            raise ArgumentError("table_rows: expected a block_table with it, got none")
        _require("table_rows", table_rows, _COUNTS, (B,), ("B",), device, False)
    Dv = v.shape[3]
    if not Dv:
        raise _mismatch("v", v, (v.dtype,), "a last dimension Dv >= 1 in [..., Dv]")

    if ranges is not None:
        if block_indices is not None:
            raise ArgumentError("ranges, block_indices: expected exactly one of them, got both")
        if block_size is not None:
            raise ArgumentError(f"block_size: expected None with ranges, got {block_size!r}")
        _require("ranges", ranges, _INDICES, (B, S, G, None, 2), ("B", "S", "G", "n", ""), device)
        n = ranges.shape[3]
    else:
        if block_indices is None:
            raise ArgumentError("ranges, block_indices: expected exactly one of them, got neither")
        _require("block_indices", block_indices, _INDICES, (B, S, G, None), ("B", "S", "G", "n"), device, False)
        block_size = _integer("block_size", block_size, 1, "with block_indices")
        n = block_indices.shape[3]

    if counts is not None:
        _require("counts", counts, _COUNTS, (B, S, G), ("B", "S", "G"), device, False)
    if seq_lens is not None:
        _require("seq_lens", seq_lens, _COUNTS, (B,), ("B",), device, False)
    flag("causal", causal)
    flag("return_lse", return_lse)
    flag("batch_invariant", batch_invariant)
    if max_selected is not None:
        max_selected = _integer("max_selected", max_selected, 0, "or None")
    scale = Dk**-0.5 if softmax_scale is None else _finite("softmax_scale", softmax_scale)

    v_factor = 1.0
    if k_scale is not None:
        k_scale, k_factor = check_scale("k_scale", k_scale, k)
        scale *= k_factor
    if v_scale is not None:
        v_scale, v_factor = check_scale("v_scale", v_scale, v)
    requires_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if requires_grad:
        refuse_gradients({"k": k, "v": v})
    refuse_tangents({"q": q, "k": k, "v": v})
    if out is not None:
        check_out(out, (B, S, G, h, Dv), dtype, device, requires_grad)
        _check_memory(
            out,
            {
                "q": q, "k": k, "v": v, "ranges": ranges, "block_indices": block_indices, "counts": counts,
                "seq_lens": seq_lens, "block_table": block_table, "table_rows": table_rows,
                "k_scale": k_scale, "v_scale": v_scale,
            },
        )  # fmt: skip

    device_type, device_index = devices.place(device)
    return Call(
        q=q, k=k, v=v, ranges=ranges, block_indices=block_indices, counts=counts, seq_lens=seq_lens,
        block_table=block_table, table_rows=table_rows, k_scale=k_scale, v_scale=v_scale, out=out,
        B=B, S=S, G=G, h=h, Dk=Dk, Dv=Dv, S_kv=S_kv, n=n,
        page_size=page_size, num_pages=num_pages, num_tables=num_tables, block_size=block_size or 0,
        dtype=DTYPE_NAMES[dtype], kv_dtype="float8_e4m3fn" if k.dtype is _FP8 else "", v_factor=v_factor,
        device_type=device_type, device_index=device_index,
        causal=causal, max_selected=max_selected, scale=scale, return_lse=return_lse, batch_invariant=batch_invariant,
        requires_grad=requires_grad,
    )  # fmt: skip


PARAMETERS = inspect.signature(check).parameters  # those of `selection_attention`, in its order, but for backend


def check_scale(name: str, value: object, cache: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Return the scale of a float8 cache as a tensor of one or three dimensions, or as a factor (else 1)."""
    if value is None:
        return None, 1.0
    if cache.dtype is not _FP8:
        got = _short(cache.dtype)
        raise ArgumentError(f"{name}: expected None where {name[0]} is not float8_e4m3fn, got one with {got}")
    if not isinstance(value, torch.Tensor):
        return None, _finite(name, value, "a finite float, a float32 tensor or None")
    if value.layout is not torch.strided:
        raise _not_a_tensor(name, value)
    if value.dtype is not torch.float32 or tuple(value.shape) not in ((), (1,), cache.shape[1:2], cache.shape[:3]):
        sizes = ", ".join(map(str, cache.shape[:3]))
        raise _mismatch(name, value, (torch.float32,), f"[], [1], [G={cache.shape[1]}] or [{sizes}] like {name[0]}")
    if value.device != cache.device:
        raise ArgumentError(f"{name}: expected device {cache.device} (that of {name[0]}), got {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise AutogradError(f"{name}: expected no gradient to be required (a scale has none), got requires_grad=True")
    return value.reshape(1) if value.dim() == 0 else value, 1.0


def _not_a_tensor(name: str, value: object) -> Exception:
    got = f"layout {value.layout}" if isinstance(value, torch.Tensor) else type(value).__name__
    return ArgumentTypeError(f"{name}: expected a strided torch.Tensor, got {got}")


def _not_contiguous(name: str, tensor: torch.Tensor) -> Exception:
    got = list(tensor.stride())
    return ArgumentError(f"{name}: expected a contiguous last dimension (stride 1), got strides {got}")


def _require(
    name: str,
    tensor: object,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    letters: tuple[str, ...],
    device: torch.device,
    contiguous_last: bool = True,
) -> None:
    """Require dtype, shape (None: any extent), device and, if asked for, a contiguous last dimension."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise _not_a_tensor(name, tensor)
    got = tensor.shape
    fits = len(got) == len(shape) and tensor.dtype in dtypes
    if fits:
        for extent, wanted in zip(got, shape):  # noqa: B905 - of equal length, and this is the hot path
            fits = fits and (wanted is None or extent == wanted)
    if not fits:
        raise _mismatch(name, tensor, dtypes, _shape_text(shape, letters))
    if tensor.device != device:
        raise ArgumentError(f"{name}: expected device {device} (that of q), got {tensor.device}")
    if contiguous_last and tensor.stride()[-1] != 1 and got[-1] > 1:
        raise _not_contiguous(name, tensor)


def _shape_text(shape: tuple[int | None, ...], letters: tuple[str, ...]) -> str:
    parts = []
    for extent, letter in zip(shape, letters, strict=True):
        if not letter:
            parts.append(str(extent))
        else:
            parts.append(letter if extent is None else f"{letter}={extent}")
    return "[" + ", ".join(parts) + "]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mismatch(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype], shape: str) -> Exception:
    wanted = " or ".join(_short(dtype) for dtype in dtypes)
    text = f"{name}: expected {wanted} {shape}, got {_short(tensor.dtype)} {list(tensor.shape)}"
    return ArgumentError(text) if tensor.dtype in dtypes else ArgumentTypeError(text)


def _integer(name: str, value: object, least: int, note: str) -> int:
    if type(value) is int and value >= least:  # an ABC takes its time
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        got = "None" if value is None else f"{type(value).__name__} {value!r}"
        raise ArgumentTypeError(f"{name}: expected an int >= {least} {note}, got {got}")
    if value < least:
        raise ArgumentError(f"{name}: expected an int >= {least} {note}, got {value}")
    return int(value)


def _finite(name: str, value: object, wanted: str = "a finite float or None") -> float:
    if type(value) is float and math.isfinite(value):  # an ABC takes its time
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(f"{name}: expected {wanted}, got {type(value).__name__} {value!r}")
    try:
        found = float(value)
    except OverflowError:
        raise ArgumentError(f"{name}: expected {wanted}, got a number beyond every float") from None
    if not math.isfinite(found):
        raise ArgumentError(f"{name}: expected {wanted}, got {value!r}")
    return found


def flag(name: str, value: object) -> None:
    """Require a bool."""
    if value is not True and value is not False:
        raise ArgumentTypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")


def refuse_gradients(caches: dict[str, torch.Tensor]) -> None:
    """Refuse gradients of a float8 cache: only q has one, and a missing one reads as zero."""
    for name, tensor in caches.items():
        if tensor.requires_grad and tensor.dtype is _FP8:
            got = "requires_grad=True"
            raise AutogradError(f"{name}: expected no gradient to be required of a float8_e4m3fn cache, got {got}")


def refuse_tangents(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse forward-mode AD: no backend carries tangents, and a missing one reads as a derivative of zero."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise AutogradError(f"{name}: expected no forward-mode derivative to be asked for, got a dual tensor")


def check_out(
    out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> None:
    """Check everything about `out` that does not need its address; under torch.compile there is none."""
    _require("out", out, (dtype,), shape, ("B", "S", "G", "h", "Dv"), device)
    if requires_grad or (torch.is_grad_enabled() and out.requires_grad):
        raise AutogradError("out: expected no gradients to be required (out= has none), got requires_grad=True")


def _check_memory(out: torch.Tensor, inputs: dict[str, torch.Tensor | None]) -> None:
    """Require that `out` has memory of its own."""
    if _overlap.overlaps_itself(out):
        raise ArgumentError(f"out: expected memory of its own for each element, got strides {list(out.stride())}")
    for name, tensor in inputs.items():
        if tensor is not None and _overlap.overlap(out, tensor):
            raise ArgumentError(f"out: expected memory of its own, got some that is {name}'s too")

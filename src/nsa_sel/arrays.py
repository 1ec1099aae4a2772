"""Arrays of other libraries (NumPy, CuPy, JAX and what else speaks DLPack), lent to torch and returned in kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from nsa_sel.check import PARAMETERS
from nsa_sel.errors import ArgumentError, ArgumentTypeError


def attend(with_tensors: Callable[..., Any], /, *arguments: Any) -> Any:
    """Call `with_tensors` with arrays, without a copy: out, and with `return_lse` (out, lse), in q's library.

    The arguments are those of `selection_attention`, each in its place.
    """
    returned = _way_back(arguments[0])
    result = with_tensors(*as_tensors(*arguments))
    return tuple(map(returned, result)) if isinstance(result, tuple) else returned(result)


def as_tensors(*arguments: Any) -> tuple[Any, ...]:
    """Return the arguments of `selection_attention`, where q is an array with a tensor in place of each of them.

    A tensor shares the memory of its array.

    Raises:
        ArgumentError, ArgumentTypeError: an array cannot be lent, or there is an `out` (not every library's arrays may
            be written to).
    """
    q = arguments[0]
    if not is_foreign(q):
        return arguments
    named = dict(zip(PARAMETERS, arguments, strict=False))  # backend, the last, is no parameter of `check`
    if named["out"] is not None:
        raise ArgumentTypeError(f"out: expected None where q is a {_kind(q)}, got one")
    return *(_as_tensor(name, value) for name, value in named.items()), *arguments[len(named) :]


def is_foreign(value: Any) -> bool:
    """Whether this is an array of another library."""
    return not isinstance(value, torch.Tensor) and hasattr(value, "__dlpack__")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def _as_tensor(name: str, value: Any) -> Any:
    if not is_foreign(value):
        return value
    # torch ends the process over a negative stride: it throws where nothing catches
    strides = getattr(value, "strides", None) or ()
    if any(stride < 0 and extent > 1 for extent, stride in zip(value.shape, strides, strict=False)):
        raise ArgumentError(f"{name}: expected strides >= 0, got {list(strides)} bytes")
    try:
        tensor = from_dlpack(value)
    # what libraries raise: dtypes that DLPack has no name for, arrays without memory of their own (tracers), devices
    except (AttributeError, AssertionError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"{name}: expected an array that DLPack can lend, got {_kind(value)}: {error}"
        ) from error
    # what is empty may have strides that no tensor would have
    return tensor if tensor.numel() else tensor.new_empty(tensor.shape)


def _way_back(q: Any) -> Callable[[torch.Tensor], Any]:
    """Return what turns a tensor into an array like q, of the same memory."""
    if isinstance(q, np.ndarray):
        return torch.Tensor.numpy  # numpy.from_dlpack makes read-only arrays of an older torch's tensors
    if not is_foreign(q):
        return lambda tensor: tensor
    if hasattr(q, "__array_namespace__"):  # CuPy 14 and JAX, by the array API standard
        return q.__array_namespace__().from_dlpack
    return sys.modules[type(q).__module__.partition(".")[0]].from_dlpack

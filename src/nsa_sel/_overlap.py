"""Whether tensors share memory, from addresses and strides alone: nothing is read."""

from __future__ import annotations

import numpy as np
import torch

_WORK = 10**6  # steps that the exact test may take; beyond, two tensors count as overlapping


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of `tensor` lie at one address."""
    dims = sorted((stride, extent) for extent, stride in zip(tensor.shape, tensor.stride(), strict=True) if extent > 1)
    reach, nested = 0, True
    for stride, extent in dims:
        nested = nested and stride > reach
        reach += (extent - 1) * stride
    if nested or not tensor.numel():
        return False
    # dimensions that interleave may still miss each other: rare enough to look at every place
    places = np.zeros(1, dtype=np.int64)
    for stride, extent in dims:
        places = np.unique(np.add.outer(places, stride * np.arange(extent)))
    return places.size < tensor.numel()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether any byte belongs to both tensors."""
    if a.device != b.device or a.is_meta or not (a.numel() and b.numel()):
        return False
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    if a_end <= b_first or b_end <= a_first:
        return False
    try:
        return bool(np.shares_memory(_Memory(a).array(), _Memory(b).array(), max_work=_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Memory:
    """What numpy takes for an array at these addresses; it may be memory of a GPU, which numpy does not touch."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"|V{size}",
        }

    def array(self) -> np.ndarray:
        return np.asarray(self)

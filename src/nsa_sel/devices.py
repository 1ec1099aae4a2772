"""Where a call's tensors lie and runs: the GPU as torch sees it.

Tests of the launch path hand over CPU tensors and say by `stand_in` which GPU they stand for; nothing else sets it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The GPU that holds the tensors."""

    name: str  # as the driver reports it; the key of a policy
    capability: tuple[int, int]
    sm_count: int = 0


@dataclass(frozen=True, slots=True)
class StandIn:
    """The GPU that CPU tensors stand for."""

    info: DeviceInfo
    index: int = 0
    stream: int = 0


stand_in: Callable[[], StandIn] | None = None


def place(device: torch.device) -> tuple[str, int]:
    """Return (device type, index) of the device that a tensor counts as being on."""
    if stand_in is not None:
        return "cuda", stand_in().index
    return device.type, device.index or 0


def info(index: int) -> DeviceInfo:
    """Return name, compute capability and number of SMs of a GPU."""
    return _properties(index) if stand_in is None else stand_in().info


@functools.cache
def _properties(index: int) -> DeviceInfo:
    properties = torch.cuda.get_device_properties(index)
    return DeviceInfo(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def current(index: int) -> AbstractContextManager[object]:
    """Make a GPU the current one for as long as the result is entered."""
    return torch.cuda.device(index) if stand_in is None else contextlib.nullcontext()


def stream(index: int) -> int:
    """Return the current stream of a GPU as the driver's handle."""
    return int(torch.cuda.current_stream(index).cuda_stream) if stand_in is None else stand_in().stream

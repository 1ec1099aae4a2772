"""The ceiling: how fast this device reads as many bytes, contiguous, in the same mode and the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa_sel.measure import clock

_LINE = 1024  # floats that one reduction of the plain reader adds up


@dataclass(frozen=True)
class Ceiling:
    """A streaming read: its samples in milliseconds, the bytes of one read, and the reader that was fastest."""

    samples: list[float]
    read_bytes: int
    reader: str

    @property
    def gbps(self) -> float:
        """Median rate in GB/s (decimal)."""
        return self.read_bytes / clock.quantiles(self.samples)[0] / 1e6


def measure_ceiling(
    moved: int, count: int, mode: str, device: torch.device, iters: int, warmup: int, memory: int
) -> Ceiling:
    """Time a streaming read of `moved` bytes (rounded up to 4 KiB) by the fastest reader here.

    `count` buffers take turns, as a workload's variants do, as far as `memory` bytes allow.
    """
    lines = max(1, -(-moved // (4 * _LINE)))
    read_bytes = lines * _LINE * 4
    owned = max(1, min(count, memory // read_bytes))
    buffers = [torch.zeros(lines, _LINE, dtype=torch.float32, device=device) for _ in range(owned)]
    found = []
    for name, make in _readers(device).items():
        calls: Sequence[clock.Call] = [make(buffers[index % owned]) for index in range(count)]
        found.append(Ceiling(clock.samples(calls, mode, device, iters, warmup), read_bytes, name))
    return max(found, key=lambda ceiling: ceiling.gbps)


def _readers(device: torch.device) -> dict[str, Callable[[torch.Tensor], clock.Call]]:
    readers: dict[str, Callable[[torch.Tensor], clock.Call]] = {"torch.sum": _torch_reader}
    if device.type == "cuda" and (kernel := _triton_kernel()) is not None:
        readers["triton"] = functools.partial(_triton_reader, kernel)
    return readers


def _torch_reader(buffer: torch.Tensor) -> clock.Call:
    return functools.partial(torch.sum, buffer, 1)


def _triton_reader(kernel: Any, buffer: torch.Tensor) -> clock.Call:
    block = 4096
    blocks = -(-buffer.numel() // block)
    sink = torch.empty(blocks, dtype=torch.float32, device=buffer.device)

    def read() -> None:
        kernel[(blocks,)](buffer, sink, buffer.numel(), BLOCK=block, num_warps=4)

    return read


@functools.cache
def _triton_kernel() -> Any:
    """Return a kernel whose every program adds up one contiguous block, or None where there is no Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def stream_read(source, sink, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        program = tl.program_id(0)
        offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(source + offsets, mask=offsets < count, other=0.0)
        tl.store(sink + program, tl.sum(values, axis=0))

    return stream_read

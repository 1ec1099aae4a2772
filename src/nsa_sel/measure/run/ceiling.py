"""The ceiling: how fast this device reads as many bytes, contiguous, in the same mode and the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nsa_sel.measure.run import clock

_LINE = 1024  # floats that one reduction of the plain reader adds up
# Floats that one Triton program reads. With blocks of 4,096 a read of 1 MB is 64 programs, which leave half of a large
# GPU idle; with the smallest a read of 1 GB is mostly launching. The fastest is what the device can do.
_BLOCKS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def fastest_reader(
    moved: int, count: int, mode: str, device: torch.device, memory: int
) -> tuple[str, int, Sequence[clock.Call]]:
    """Return name, bytes of one read, and `count` calls of the fastest streaming read of `moved` bytes here.

    The bytes are rounded up to 4 KiB. `count` buffers take turns, as a workload's variants do, as far as `memory` bytes
    allow.
    """
    lines = max(1, -(-moved // (4 * _LINE)))
    read_bytes = lines * _LINE * 4
    owned = max(1, min(count, memory // read_bytes))
    buffers = [torch.zeros(lines, _LINE, dtype=torch.float32, device=device) for _ in range(owned)]
    found: list[tuple[float, str, Sequence[clock.Call]]] = []
    for name, make in _readers(device).items():
        try:
            calls: Sequence[clock.Call] = [make(buffers[index % owned]) for index in range(count)]
            found.append((min(clock.samples(calls, mode, device, iters=5, warmup=2)), name, calls))
        except Exception:  # a reader that this Triton cannot compile is none; PyTorch's own must work
            if name == "torch.sum":
                raise
    _, name, calls = min(found, key=lambda one: one[0])
    return name, read_bytes, calls


def _readers(device: torch.device) -> dict[str, Callable[[torch.Tensor], clock.Call]]:
    readers: dict[str, Callable[[torch.Tensor], clock.Call]] = {"torch.sum": _torch_reader}
    if device.type == "cuda" and (kernel := _triton_kernel()) is not None:
        readers |= {f"triton, blocks of {block}": functools.partial(_triton_reader, kernel, block) for block in _BLOCKS}
    return readers


def _torch_reader(buffer: torch.Tensor) -> clock.Call:
    return functools.partial(torch.sum, buffer, 1)


def _triton_reader(kernel: Any, block: int, buffer: torch.Tensor) -> clock.Call:
    blocks = -(-buffer.numel() // block)
    sink = torch.empty(blocks, dtype=torch.float32, device=buffer.device)
    return lambda: kernel[(blocks,)](buffer, sink, buffer.numel(), BLOCK=block, num_warps=4)


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

"""Timing of calls in three modes: CUDA events on a GPU, the monotonic clock on a CPU; every sample is kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from nsa_sel.measure.schema import MODES, TIMES

Call = Callable[[], Any]
Sample = Callable[[], float]


class ModeError(ValueError):
    """A mode that this device does not have."""


def refused_mode(mode: str, device: torch.device) -> str | None:
    """Return why `mode` cannot be measured on `device`, or None."""
    if mode not in MODES:
        return f"expected one of {', '.join(MODES)}, got {mode!r}"
    if mode != "eager" and device.type != "cuda":
        return f"mode {mode} needs a CUDA device, got {device.type}"
    return None


def samples(calls: Sequence[Call], mode: str, device: torch.device, iters: int, warmup: int) -> list[float]:
    """Return `iters` samples of a `sampler`."""
    with measuring(device):
        sample = sampler(calls, mode, device, warmup)
        return [sample() for _ in range(iters)]


def sampler(calls: Sequence[Call], mode: str, device: torch.device, warmup: int) -> Sample:
    """Return a function that takes one sample in milliseconds per call, the mean over all `calls`; warmed up.

    eager: the calls one after another from an idle GPU, so the host's part counts. graph: one replay of a CUDA graph
    that holds them all. streams2: every other call on a second stream, both streams at once. L2 is flushed before
    each sample, and the calls take different inputs, so none finds its data there.

    Raises:
        ModeError: the device does not have this mode.
    """
    if reason := refused_mode(mode, device):
        raise ModeError(reason)
    if device.type != "cuda":
        found = _on_cpu(calls)
    elif mode == "graph":
        found = _replayed(calls, device, warmup)
    else:
        found = _launched(calls, device, streams=2 if mode == "streams2" else 1)
    for _ in range(warmup):
        found()
    return found


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Make `device` the current one; a CPU computes on one thread and keeps the memory that it was given."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        _keep_memory()
        with one_thread(device):
            yield


@functools.cache
def _keep_memory() -> None:
    """Stop the C library from giving large buffers back: each page of one would be mapped anew in every call.

    By itself it learns that as it goes, so that whichever shape came first took up to twice its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Run PyTorch on one thread on a CPU: threads that wait for each other on a busy machine stall for 40 ms."""
    threads = torch.get_num_threads()
    if device.type != "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile."""
    median, low, high = np.quantile(np.asarray(values, dtype=float), [0.5, 0.2, 0.8]).tolist()
    return median, low, high


def figure(value: float) -> str:
    """Return a number with 7 digits: a speed-up rounded to less would contradict the times beside it."""
    return f"{value:.7g}"


def columns(samples: Sequence[float]) -> dict[str, str]:
    """Return the time columns of a CSV file, `schema.TIMES`."""
    return dict(zip(TIMES, map(figure, quantiles(samples)), strict=True))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % confidence interval of the median, from order statistics alone: times have no known distribution.

    >>> median_interval(list(range(100)))
    (39, 60)
    """
    ordered = sorted(values)
    count = len(ordered)
    half = 1.96 * math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - half) - 1), min(count - 1, math.ceil(count / 2 + half))
    return ordered[low], ordered[high]


def _on_cpu(calls: Sequence[Call]) -> Sample:
    def sample() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e3 / len(calls)

    return sample


@functools.cache
def flush_of(device: torch.device) -> Call:
    """Return a call that writes twice the size of L2, so that nothing else is left in it."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(size, 1 << 20), dtype=torch.int8, device=device)
    return buffer.zero_


def _launched(calls: Sequence[Call], device: torch.device, streams: int) -> Sample:
    flush = flush_of(device)
    main = torch.cuda.current_stream(device)
    side = [main] if streams == 1 else [torch.cuda.Stream(device) for _ in range(streams)]

    def round_of_calls() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush()
        torch.cuda.synchronize(device)  # an idle GPU: launches are not hidden behind the flush
        start.record(main)
        for stream in side:
            stream.wait_event(start)
        for index, call in enumerate(calls):
            with torch.cuda.stream(side[index % streams]):
                call()
        for stream in side:
            main.wait_stream(stream)
        end.record(main)
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / len(calls)

    return round_of_calls


def _replayed(calls: Sequence[Call], device: torch.device, warmup: int) -> Sample:
    def all_calls() -> None:
        for call in calls:
            call()

    flush, graph = flush_of(device), captured(all_calls, all_calls, device, warmup)

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush()  # also the backlog that hides the launch of the replay itself
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / len(calls)

    return replay


def captured(warm: Call, run: Call, device: torch.device, warmup: int) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of `run` after `warm` ran at least once: lazy set-up must not fall into the capture."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(max(1, warmup)):
            warm()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph

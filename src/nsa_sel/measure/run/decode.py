"""Timing a decode step: each stage inside one step, the whole step apart from that, and proof of what ran."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa_sel.backends import sdpa
from nsa_sel.measure import schema
from nsa_sel.measure.run.clock import (
    ModeError,
    captured,
    columns,
    figure,
    flush_of,
    measuring,
    median_interval,
    quantiles,
)
from nsa_sel.measure.run.decode_step import DecodeStep
from nsa_sel.measure.run.environment import clocks, device_columns
from nsa_sel.measure.run.race import counts, proof
from nsa_sel.measure.schema import STAGES

CPU_SAMPLE_MS = 100.0
CPU_SAMPLE_STEPS = 3  # at least, of each kind
CPU_SAMPLE_LIMIT_MS = 1000.0  # a sample ends then, even if every step was stopped
CALM = 0.98  # a step was not stopped if its thread computed for this part of its time
Sample = Callable[[], list[float]]  # milliseconds of each stage, or of the whole step alone
Pair = Callable[[], tuple[list[float], float]]  # milliseconds of each stage of one step, and of another step as a whole


@dataclass(frozen=True)
class StepTimes:
    """Samples in milliseconds: by stage, of the whole step, and what ran the selection."""

    stages: dict[str, list[float]]
    step: list[float]
    ran: str

    @property
    def shares(self) -> dict[str, float]:
        """Median of each stage over the median of the step; never made to add up to 1."""
        whole = quantiles(self.step)[0]
        return {stage: quantiles(values)[0] / whole for stage, values in self.stages.items()}

    @property
    def residual(self) -> float:
        """The part of the step that no stage accounts for; below 0 where the stages take more than the step."""
        return 1 - sum(self.shares.values())


def time_steps(
    steps: list[DecodeStep], mode: str, device: torch.device, iters: int, warmup: int
) -> tuple[list[StepTimes], list[dict[str, int] | None]]:
    """Time `iters` samples of each step with marks between the stages and as many without, all in turns.

    Returns the times of each, and the clocks before and after.

    Raises:
        ModeError: the device does not have this mode.
    """
    if mode not in ("eager", "graph") or (mode == "graph" and device.type != "cuda"):
        raise ModeError(f"mode: expected eager, or graph on a CUDA device, got {mode!r} on {device.type}")
    before, calls = counts(), [step.select_calls for step in steps]
    with measuring(device):
        pairs = [_pair(step, mode, device, max(1, warmup)) for step in steps]
        for _ in range(warmup):
            for pair in pairs:
                pair()
        clock = [clocks(device)]
        samples = [[pair() for pair in pairs] for _ in range(iters)]
        clock.append(clocks(device))
    ran = Counter(counts())
    ran.subtract(before)
    found = []
    for index, step in enumerate(steps):
        mine = [row[index] for row in samples]
        others = {other.backend for other in steps} - {step.backend}
        counted = Counter({name: count for name, count in ran.items() if name not in others})
        made = step.select_calls - calls[index]
        stages = {stage: [parts[at] for parts, _ in mine] for at, stage in enumerate(STAGES)}
        found.append(StepTimes(stages, [w for _, w in mine], proof(step.backend, counted, made) if made else ""))
    return found, clock


def medians_of(steps: list[DecodeStep], times: list[StepTimes]) -> dict[tuple[str, str], tuple[list[float], str]]:
    """Return samples and what ran, by stage and backend: all of the first step, selection and whole of the others."""
    found: dict[tuple[str, str], tuple[list[float], str]] = {}
    for index, (step, one) in enumerate(zip(steps, times, strict=True)):
        for stage in STAGES if index == 0 else ("select",):
            name, ran = (step.backend, one.ran) if stage == "select" else (schema.TORCH, schema.TORCH)
            found[stage, name] = (one.stages[stage], "" if stage in step.left_out else ran)
        found[schema.STEP, step.backend] = (one.step, one.ran)
    return found


def rows_of(steps: list[DecodeStep], times: list[StepTimes], device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of decode.csv: the stages with the first backend, then selection and step with the others."""
    whole = {step.backend: quantiles(one.step)[0] for step, one in zip(steps, times, strict=True)}
    base = whole[steps[0].backend]
    rows = []
    for (stage, name), (samples, ran) in medians_of(steps, times).items():
        row = {"B": steps[0].batch, "context": steps[0].context, "stage": stage, **columns(samples)}
        share = quantiles(samples)[0] / whole.get(name, base)
        rows.append(row | {"share": figure(share), "backend": name, "ran": ran, **device_columns(device)})
    return rows


def facts_of(steps: list[DecodeStep], times: list[StepTimes]) -> dict[str, Any]:
    """Return what decode.csv has no column for: residual, intervals, bytes and tokens read, the step's speed-up."""
    step, shape = steps[0], steps[0].shape
    gathered = sdpa.counters().gathered_bytes
    reads = step.count_reads()
    gathered = sdpa.counters().gathered_bytes - gathered
    row = step.batch * shape.G
    tokens = {
        "compressed": step.k_cmp.shape[2],
        "selected": step.selected_tokens() / row,
        "window": step.k_win.shape[2],
    }
    measured = medians_of(steps, times)
    intervals = {f"{stage} {name}": median_interval(found) for (stage, name), (found, _) in measured.items()}
    whole, share = quantiles(times[0].step)[0], times[0].shares["select"]
    facts: dict[str, Any] = {
        "B": step.batch,
        "context": step.context,
        "step_ms": whole,
        "ms_median_ci95": intervals,
        "residual": times[0].residual,
        "bytes_read": reads,
        "bytes_gathered_by_sdpa": gathered,
        "tokens_read_per_group": tokens | {"all": sum(tokens.values())},
        # The paper's own count (table 4), from the lengths alone: something to hold the counted ones against.
        "tokens_by_the_paper": context_tokens(step.context),
        "sparse": step.context > shape.dense_until(),
    }
    for other, one in zip(steps[1:], times[1:], strict=True):
        faster = quantiles(times[0].stages["select"])[0] / quantiles(one.stages["select"])[0]
        with_it = {"select": faster, "step": whole / quantiles(one.step)[0]}
        with_it["expected"] = 1 / (1 - share + share / faster)
        facts[f"speedup of {other.backend}"] = with_it
    return facts


def context_tokens(context: int) -> int:
    """Return the tokens that one step reads per group by the paper's count: compressed, selected and window.

    >>> [context_tokens(context) for context in (8192, 16384, 32768, 65536)]
    [2048, 2560, 3584, 5632]
    """
    return context // 16 + min(1024, context) + min(512, context)


def _pair(step: DecodeStep, mode: str, device: torch.device, warmup: int) -> Pair:
    if device.type != "cuda":
        return _cpu_pair(step)
    staged, whole = (_gpu_sampler(step, mode, device, warmup, marks) for marks in (True, False))
    return lambda: (staged(), whole()[0])


def _cpu_pair(step: DecodeStep) -> Pair:
    """Return a sampler of the fastest staged and the fastest whole step, in turns, of CPU_SAMPLE_MS of computing.

    Other processes stop a step of a few milliseconds often and for as long again. Medians of such times do not add up:
    the step's holds a stop when those of its shorter stages hold none. The fastest step holds none, in whole and by
    stage. Whether one of each kind was not stopped shows in the thread's own time; if none was, the sample goes on.
    """

    def sample() -> tuple[list[float], float]:
        staged: list[list[float]] = []
        whole: list[float] = []
        calm = {"staged": False, "whole": False}
        begun, computed = time.perf_counter(), time.thread_time()
        while len(whole) < CPU_SAMPLE_STEPS or not (
            (all(calm.values()) and time.thread_time() - computed > CPU_SAMPLE_MS / 1e3)
            or time.perf_counter() - begun > CPU_SAMPLE_LIMIT_MS / 1e3
        ):
            stamps: list[float] = []
            own = time.thread_time()
            step.run(lambda _, stamps=stamps: stamps.append(time.perf_counter()))  # type: ignore[misc]
            own = time.thread_time() - own
            staged.append([(end - start) * 1e3 for start, end in itertools.pairwise(stamps)])
            calm["staged"] |= own > CALM * (stamps[-1] - stamps[0])
            own, start = time.thread_time(), time.perf_counter()
            step.run()
            elapsed = time.perf_counter() - start
            whole.append(elapsed * 1e3)
            calm["whole"] |= time.thread_time() - own > CALM * elapsed
        return min(staged, key=sum), min(whole)

    return sample


def _gpu_sampler(step: DecodeStep, mode: str, device: torch.device, warmup: int, marks: bool) -> Sample:
    """Return a sampler of one step with a mark around every stage, or around the whole of it."""
    flush, inside = flush_of(device), marks and mode == "graph"
    # External events become nodes of the graph and are recorded by every replay; others would only order its streams.
    events = [torch.cuda.Event(enable_timing=True, external=inside) for _ in range(len(STAGES) + 1 if marks else 2)]

    def run() -> None:
        step.run((lambda index: events[index].record()) if marks else None)

    once = captured(step.run, run, device, warmup).replay if mode == "graph" else run

    def sample() -> list[float]:
        flush()  # other layers would have pushed this one's caches out of L2
        if mode == "eager":
            torch.cuda.synchronize(device)  # an idle GPU: launches are not hidden behind the flush
        if not marks:
            events[0].record()
        once()
        if not marks:
            events[-1].record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    return sample

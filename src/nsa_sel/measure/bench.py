"""The microbenchmark: every contestant on the same inputs of a workload, in every mode, in one run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nsa_sel.measure import clock, schema
from nsa_sel.measure.ceiling import Ceiling, measure_ceiling
from nsa_sel.measure.contestants import GATHERED, OWN, Contestant, check_of, moved_bytes
from nsa_sel.measure.environment import device_columns
from nsa_sel.measure.inputs import oracle_rows
from nsa_sel.measure.timed import Settings, Timed, cold_variants, free_memory, time_contestant, too_large
from nsa_sel.measure.workload import Workload
from nsa_sel.reference import selection_attention_reference


@dataclass
class Results:
    """What a run has found: rows of bench.csv, and what the CSV has no column for."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    intervals: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    parity_failures: list[str] = field(default_factory=list)

    def add(self, more: Results) -> None:
        """Take over everything in `more`."""
        self.rows += more.rows
        self.intervals += more.intervals
        self.not_measured += more.not_measured
        self.skipped |= more.skipped
        self.parity_failures += more.parity_failures


def run_bench(
    workloads: Iterable[Workload],
    contestants: list[Contestant],
    settings: Settings,
    results: Results,
    seconds: float | None = None,
) -> Iterator[str]:
    """Measure `workloads`, adding to `results`; yields each workload's name once it is done.

    No further workload is started after `seconds`.
    """
    started = time.monotonic()
    for workload in workloads:
        if seconds is not None and time.monotonic() - started > seconds:
            results.skipped[workload.name] = f"not started within {seconds:g} s"
        elif reason := too_large(workload, settings.device):
            results.skipped[workload.name] = reason
        else:
            # Only whole workloads are kept: a run that is cut off inside one must measure it again when it goes on.
            results.add(_measure(workload, contestants, settings))
        yield workload.name


def _measure(workload: Workload, contestants: list[Contestant], settings: Settings) -> Results:
    results = Results()
    device = settings.device
    variants = cold_variants(workload, settings)
    rows = oracle_rows(workload, settings.seed)
    first = variants[0]
    expected, _ = selection_attention_reference(first.q, first.k, first.v, **first.selection(), rows=rows)
    moved = moved_bytes(first)
    for mode in settings.modes:
        timed: dict[str, Timed] = {}
        ceiling = None
        if clock.refused_mode(mode, device) is None:
            ceiling = measure_ceiling(
                moved, len(variants), mode, device, settings.iters, settings.warmup, free_memory(device) // 3
            )
        for contestant in contestants:
            one = time_contestant(contestant, variants, mode, settings, (expected, rows))
            own = contestant.name in (*OWN, GATHERED)
            if not own and one.samples and not one.mae <= check_of(workload):
                one.samples, one.reason = [], f"computed something else: MAE {one.mae:.3g} against the oracle"
            if one.reason:
                results.not_measured.append(_absence(workload, contestant.name, mode, one.reason))
            if one.reason and not own:
                continue  # a peer that has no time on this workload has no row
            timed[contestant.name] = one
        _add_rows(workload, mode, timed, moved, ceiling, settings, results)
        for name, one in timed.items():
            if one.samples and not one.mae <= check_of(workload):
                results.parity_failures.append(_reproduction(workload, name, mode, settings, one))
    return results


def _add_rows(
    workload: Workload,
    mode: str,
    timed: dict[str, Timed],
    moved: int,
    ceiling: Ceiling | None,
    settings: Settings,
    results: Results,
) -> None:
    base = timed.get(schema.BASELINE)
    base_ms = clock.quantiles(base.samples)[0] if base and base.samples and base.ran == schema.BASELINE else None
    where = device_columns(settings.device)
    shape = {letter: getattr(workload, letter) for letter in schema.BENCH_SHAPE}
    for name, one in timed.items():
        row: dict[str, Any] = dict.fromkeys(schema.BENCH_COLUMNS, "")
        row |= {"workload": workload.name, "dist": workload.dist, "dtype": workload.dtype, **shape, **where}
        row |= {"backend": name, "ran": one.ran, "mode": mode, "iters": len(one.samples), "bytes": moved}
        if ceiling is not None:
            row["ceiling_gbps"] = figure(ceiling.gbps)
        if one.samples:
            median, low, high = clock.quantiles(one.samples)
            rate = moved / median / 1e6
            row |= {"ms_median": figure(median), "ms_p20": figure(low), "ms_p80": figure(high), "gbps": figure(rate)}
            row |= {"mae": figure(one.mae), "max_err": figure(one.max_err)}
            if ceiling is not None:
                row["ceiling_share"] = figure(rate / ceiling.gbps)
            if base_ms is not None and one.ran == name:  # what did not run is compared with nothing
                row["speedup"] = figure(base_ms / median)
            interval = clock.median_interval(one.samples)
            results.intervals.append(
                {
                    "workload": workload.name,
                    "backend": name,
                    "mode": mode,
                    "ms_median_ci95": [round(x, 9) for x in interval],
                }
            )
        results.rows.append(row)
    if ceiling is not None:
        results.intervals.append(
            {"workload": workload.name, "backend": "ceiling", "mode": mode, "reader": ceiling.reader}
            | {"ms_median_ci95": [round(x, 9) for x in clock.median_interval(ceiling.samples)]}
        )


def figure(value: float) -> str:
    """Return a number with 7 digits: a speed-up rounded to less would contradict the times beside it."""
    return f"{value:.7g}"


def _reproduction(workload: Workload, name: str, mode: str, settings: Settings, one: Timed) -> str:
    return (
        f"{name} ({mode}) on {workload.name}: MAE {one.mae:.3g}, largest error {one.max_err:.3g}. Reproduce: "
        f"nsa-sel bench {workload.arguments()} --backend {name} --mode {mode} --seed {settings.seed} "
        f"--device {settings.device}"
    )


def _absence(workload: Workload, name: str, mode: str, reason: str) -> dict[str, str]:
    return {"workload": workload.name, "backend": name, "mode": mode, "reason": reason}

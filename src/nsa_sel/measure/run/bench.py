"""The microbenchmark: every contestant on the same inputs of a workload, in every mode, in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nsa_sel.measure import schema
from nsa_sel.measure.run import clock
from nsa_sel.measure.run.ceiling import fastest_reader
from nsa_sel.measure.run.contestants import Contestant, check_of, moved_bytes
from nsa_sel.measure.run.environment import device_columns
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import Adapter, Peer
from nsa_sel.measure.run.race import (
    Case,
    ContextLostError,
    Settings,
    Timed,
    cold_variants,
    free_memory,
    oracle_of,
    race,
    too_large,
)
from nsa_sel.measure.run.workload import Workload
from nsa_sel.measure.schema import HERE

CEILING = "ceiling"
NOT_STARTED = "not started within"
Facts = list[dict[str, Any]]


@dataclass
class Results:
    """What a run has found: rows of bench.csv, and what the CSV has no column for."""

    rows: Facts = field(default_factory=list)
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: the whole shape
    intervals: Facts = field(default_factory=list)
    clocks: Facts = field(default_factory=list)
    anchors: Facts = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    parity_failures: list[str] = field(default_factory=list)

    def add(self, more: Results) -> None:
        """Take over everything in `more`."""
        self.rows += more.rows
        self.workloads |= more.workloads
        self.intervals += more.intervals
        self.clocks += more.clocks
        self.anchors += more.anchors
        self.not_measured += more.not_measured
        self.skipped |= more.skipped
        self.parity_failures += more.parity_failures


def run_bench(
    workloads: Iterable[Workload],
    contestants: Sequence[Contestant],
    peers: Sequence[tuple[Adapter, Peer]],
    settings: Settings,
    results: Results,
    seconds: float | None = None,
) -> Iterator[str]:
    """Measure `workloads`, adding to `results`; yields each workload's name once it is done.

    No further workload is started after `seconds`.

    Raises:
        ContextLostError: no further workload can run in this process; the one that broke it has its rows.
    """
    started = time.monotonic()
    for workload in workloads:
        if seconds is not None and time.monotonic() - started > seconds:
            results.skipped[workload.name] = f"{NOT_STARTED} {seconds:g} s"
        elif reason := too_large(workload, settings.device):
            results.skipped[workload.name] = reason
        else:
            one = _OneWorkload(workload, settings)
            try:
                one.measure(contestants, peers)
            finally:
                if one.whole:  # a run that is cut off inside a workload must measure it again when it goes on
                    results.add(one.results)
        yield workload.name


class _OneWorkload:
    def __init__(self, workload: Workload, settings: Settings) -> None:
        self.workload, self.settings = workload, settings
        self.results = Results(workloads={workload.name: asdict(workload)})
        self.whole = False
        self.moved = self.calls = 0
        self.base: dict[str, float] = {}  # median of the baseline by mode

    def measure(self, contestants: Sequence[Contestant], peers: Sequence[tuple[Adapter, Peer]]) -> None:
        with clock.measuring(self.settings.device):
            variants = cold_variants(self.workload, self.settings)
            oracle = oracle_of(self.workload, variants[0], self.settings.seed)
            self.moved, self.calls = moved_bytes(variants[0]), len(variants)
        lost: ContextLostError | None = None
        for mode in self.settings.modes:
            try:
                reader, others = self._ceiling(variants, mode) if lost is None else ("", {})
                if lost is not None:
                    self._add(mode, Case({c.name: Timed(reason=f"not measured: {lost.args[0]}") for c in contestants}))
                else:
                    self._add(mode, race(contestants, variants, mode, self.settings, oracle, others), reader)
            except ContextLostError as error:
                lost = error
                self._add(mode, error.args[1])
        refused = {adapter.name: self._refusal(adapter, variants[0]) for adapter, _ in peers}
        del variants, oracle
        if self.settings.device.type == "cuda" and lost is None:
            gc.collect()
            torch.cuda.empty_cache()  # the peers' processes make the same inputs
        for mode in self.settings.modes:
            for _, peer in peers:
                self._run_peer(mode, peer, refused[peer.name])
        self.whole = True
        if lost is not None:
            raise lost

    def _ceiling(self, variants: list[Inputs], mode: str) -> tuple[str, dict[str, Sequence[clock.Call]]]:
        device = self.settings.device
        if clock.refused_mode(mode, device) is not None:
            return "", {}
        with clock.measuring(device):
            name, self.read_bytes, calls = fastest_reader(
                self.moved, len(variants), mode, device, free_memory(device) // 3
            )
        return name, {CEILING: calls}

    def _refusal(self, adapter: Adapter, inputs: Inputs) -> str:
        try:
            return adapter.refuses(inputs) or ""
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _run_peer(self, mode: str, peer: Peer, refused: str) -> None:
        if reason := refused or clock.refused_mode(mode, self.settings.device):
            self._absence(mode, peer.name, reason)  # it takes no such inputs: no failure, and no row
            return
        timed, anchor = peer.measure(self.workload, mode)
        for _ in range(2):  # a moment's disturbance must not cost the row
            if timed.reason or not self._apart(mode, anchor):
                break
            timed, anchor = peer.measure(self.workload, mode)
        if timed.samples and not timed.mae <= check_of(self.workload):
            timed = Timed(reason=f"computed something else: MAE {timed.mae:.3g} against the oracle")
        if not timed.reason and (off := self._apart(mode, anchor)):
            timed = Timed(reason=f"its process times sdpa {off:.1%} from this one")
        if anchor.samples and mode in self.base:
            case = {"workload": self.workload.name, "backend": peer.name, "mode": mode}
            both = {"anchor_ms": clock.quantiles(anchor.samples)[0], "sdpa_ms": self.base[mode]}
            self.results.anchors.append(case | both)
        self._row(mode, peer.name, timed, self._ceiling_of(mode) if timed.samples else None)

    def _apart(self, mode: str, anchor: Timed) -> float:
        """Return how far a peer's process is off this one, 0 where that is near enough."""
        if mode not in self.base:
            return 0.0
        if not anchor.samples:
            return float("inf")
        off = abs(clock.quantiles(anchor.samples)[0] / self.base[mode] - 1)
        return off if off > self.settings.anchor_off else 0.0

    def _add(self, mode: str, case: Case, reader: str = "") -> None:
        ceiling = case.timed.pop(CEILING, None)
        gbps = None
        if ceiling is not None and ceiling.samples:
            gbps = self.read_bytes / clock.quantiles(ceiling.samples)[0] / 1e6
            self._interval(mode, CEILING, ceiling, reader=reader)
        if any(case.clocks):
            before, after = case.clocks
            self.results.clocks.append({"workload": self.workload.name, "mode": mode, "before": before, "after": after})
        base = case.timed.get(schema.BASELINE)
        if base is not None and base.samples and base.ran == schema.BASELINE:
            self.base[mode] = clock.quantiles(base.samples)[0]
        for name, one in case.timed.items():
            self._row(mode, name, one, gbps)

    def _row(self, mode: str, name: str, one: Timed, gbps: float | None) -> None:
        workload = self.workload
        row: dict[str, Any] = dict.fromkeys(schema.BENCH_COLUMNS, "")
        row |= {letter: getattr(workload, letter) for letter in ("dist", "dtype", *schema.BENCH_SHAPE)}
        row |= {"workload": workload.name, **device_columns(self.settings.device)}
        row |= {"backend": name, "ran": one.ran, "mode": mode, "iters": len(one.samples), "bytes": self.moved}
        row |= {} if gbps is None else {"ceiling_gbps": figure(gbps)}
        if one.samples:
            median, low, high = clock.quantiles(one.samples)
            rate = self.moved / median / 1e6
            row |= {"ms_median": figure(median), "ms_p20": figure(low), "ms_p80": figure(high), "gbps": figure(rate)}
            row |= {"mae": figure(one.mae), "max_err": figure(one.max_err)}
            row |= {} if gbps is None else {"ceiling_share": figure(rate / gbps)}
            if mode in self.base and one.ran == name:  # what did not run is compared with nothing
                row["speedup"] = figure(self.base[mode] / median)
            self._interval(mode, name, one)
        self.results.rows.append(row)
        if one.reason:
            self._absence(mode, name, one.reason)
        if one.samples and name in HERE and not one.mae <= check_of(workload):
            self.results.parity_failures.append(_reproduction(workload, name, mode, self.settings, one))

    def _absence(self, mode: str, name: str, reason: str) -> None:
        absence = {"workload": self.workload.name, "backend": name, "mode": mode, "reason": reason}
        self.results.not_measured.append(absence)

    def _ceiling_of(self, mode: str) -> float | None:
        found = [r["ceiling_gbps"] for r in self.results.rows if r["mode"] == mode and r["ceiling_gbps"]]
        return float(found[0]) if found else None

    def _interval(self, mode: str, name: str, one: Timed, **more: Any) -> None:
        interval = [round(x, 9) for x in clock.median_interval(one.samples)]
        row = {"workload": self.workload.name, "backend": name, "mode": mode, "ms_median_ci95": interval}
        self.results.intervals.append(row | {"calls": self.calls} | more)


def figure(value: float) -> str:
    """Return a number with 7 digits: a speed-up rounded to less would contradict the times beside it."""
    return f"{value:.7g}"


def _reproduction(workload: Workload, name: str, mode: str, settings: Settings, one: Timed) -> str:
    return (
        f"{name} ({mode}) on {workload.name}: MAE {one.mae:.3g}, largest error {one.max_err:.3g}. Reproduce: "
        f"nsa-sel bench {workload.arguments()} --backend {name} --mode {mode} --seed {settings.seed} "
        f"--device {settings.device}"
    )

"""The microbenchmark: every contestant on the same inputs of a workload, in every mode, in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from nsa_sel.measure import schema
from nsa_sel.measure.run import clock
from nsa_sel.measure.run.ceiling import fastest_reader
from nsa_sel.measure.run.contestants import Contestant, check_of, moved_bytes
from nsa_sel.measure.run.environment import device_columns
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import Peer
from nsa_sel.measure.run.race import (
    Case,
    ContextLostError,
    Oracle,
    Settings,
    Timed,
    free_memory,
    race,
    set_up,
    too_large,
)
from nsa_sel.measure.run.workload import Workload

CEILING = "ceiling"
NOT_STARTED = "not started within"
Facts = list[dict[str, Any]]
Peers = Sequence[tuple[Contestant, Peer]]  # its adapter, for what it refuses, and its process


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
        for one in fields(self):
            setattr(self, one.name, joined(getattr(self, one.name), getattr(more, one.name)))


def joined(one: Any, other: Any) -> Any:
    """Return two lists, or two dictionaries, as one."""
    return one | other if isinstance(one, dict) else one + other


def run_bench(
    workloads: Iterable[Workload],
    contestants: Sequence[Contestant],
    peers: Peers,
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
        self.ceiling: dict[str, float] = {}  # GB/s by mode

    def measure(self, contestants: Sequence[Contestant], peers: Peers) -> None:
        variants, oracle = set_up(self.workload, self.settings)
        self.moved, self.calls = moved_bytes(variants[0]), len(variants)
        lost: ContextLostError | None = None
        for mode in self.settings.modes:
            try:
                if lost is None:
                    self._race(mode, contestants, variants, oracle)
                else:
                    self._add(mode, Case({c.name: Timed(reason=f"not measured: {lost.args[0]}") for c in contestants}))
            except ContextLostError as error:
                lost = error
                self._add(mode, error.args[1])
        refused = {adapter.name: _refusal(adapter, variants[0]) for adapter, _ in peers}
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

    def _race(self, mode: str, contestants: Sequence[Contestant], variants: list[Inputs], oracle: Oracle) -> None:
        device = self.settings.device
        others: dict[str, Sequence[clock.Call]] = {}
        reader, read_bytes = "", 0
        if clock.refused_mode(mode, device) is None:
            with clock.measuring(device):
                memory = free_memory(device) // 3
                reader, read_bytes, others[CEILING] = fastest_reader(self.moved, self.calls, mode, device, memory)
        case = race(contestants, variants, mode, self.settings, oracle, others)
        ceiling = case.timed.pop(CEILING, Timed())
        if ceiling.samples:
            self.ceiling[mode] = read_bytes / clock.quantiles(ceiling.samples)[0] / 1e6
            self._interval(mode, CEILING, ceiling, reader=reader)
        self._add(mode, case)

    def _add(self, mode: str, case: Case) -> None:
        case.timed.pop(CEILING, None)
        if any(case.clocks):
            before, after = case.clocks
            self.results.clocks.append({"workload": self.workload.name, "mode": mode, "before": before, "after": after})
        base = case.timed.get(schema.BASELINE)
        if base is not None and base.samples and base.ran == schema.BASELINE:
            self.base[mode] = clock.quantiles(base.samples)[0]
        for name, one in case.timed.items():
            self._row(mode, name, one)

    def _run_peer(self, mode: str, peer: Peer, refused: str) -> None:
        if reason := refused or clock.refused_mode(mode, self.settings.device):
            self._absence(mode, peer.name, reason)  # it takes no such inputs: no failure, and no row
            return
        for _ in range(3):  # a moment's disturbance must not cost the row
            timed, anchor = peer.measure(self.workload, mode)
            off = self._apart(mode, anchor)
            if timed.reason or not off:
                break
        if timed.samples and not timed.mae <= check_of(self.workload):
            timed = Timed(reason=f"computed something else: MAE {timed.mae:.3g} against the oracle")
        elif off and not timed.reason:
            timed = Timed(reason=f"its process times sdpa {off:.1%} from this one")
        if anchor.samples and mode in self.base:
            case = {"workload": self.workload.name, "backend": peer.name, "mode": mode}
            both = {"anchor_ms": clock.quantiles(anchor.samples)[0], "sdpa_ms": self.base[mode]}
            self.results.anchors.append(case | both)
        self._row(mode, peer.name, timed)

    def _apart(self, mode: str, anchor: Timed) -> float:
        """Return how far a peer's process is off this one, 0 where that is near enough."""
        if mode not in self.base or not anchor.samples:
            return float("inf") if mode in self.base else 0.0
        off = abs(clock.quantiles(anchor.samples)[0] / self.base[mode] - 1)
        return off if off > self.settings.anchor_off else 0.0

    def _row(self, mode: str, name: str, one: Timed) -> None:
        workload = self.workload
        row: dict[str, Any] = dict.fromkeys(schema.BENCH_COLUMNS, "")
        row |= {letter: getattr(workload, letter) for letter in ("dist", "dtype", *schema.BENCH_SHAPE)}
        row |= {"workload": workload.name, "backend": name, "ran": one.ran, "mode": mode, "iters": len(one.samples)}
        row |= {"bytes": self.moved, **device_columns(self.settings.device), **one.columns()}
        if mode in self.ceiling and (one.samples or name in schema.HERE):
            row["ceiling_gbps"] = clock.figure(self.ceiling[mode])
        if one.samples:
            median = clock.quantiles(one.samples)[0]
            rate = self.moved / median / 1e6
            row["gbps"] = clock.figure(rate)
            row |= {"ceiling_share": clock.figure(rate / self.ceiling[mode])} if mode in self.ceiling else {}
            if mode in self.base and one.ran == name:  # what did not run is compared with nothing
                row["speedup"] = clock.figure(self.base[mode] / median)
            self._interval(mode, name, one)
        self.results.rows.append(row)
        if one.reason:
            self._absence(mode, name, one.reason)
        if one.samples and name in schema.HERE and not one.mae <= check_of(workload):
            how = f"--backend {name} --mode {mode} --seed {self.settings.seed} --device {self.settings.device}"
            self.results.parity_failures.append(
                f"{name} ({mode}) on {workload.name}: MAE {one.mae:.3g}, largest error {one.max_err:.3g}. "
                f"Reproduce: nsa-sel bench {workload.arguments()} {how}"
            )

    def _absence(self, mode: str, name: str, reason: str) -> None:
        absence = {"workload": self.workload.name, "backend": name, "mode": mode, "reason": reason}
        self.results.not_measured.append(absence)

    def _interval(self, mode: str, name: str, one: Timed, **more: Any) -> None:
        interval = [round(x, 9) for x in clock.median_interval(one.samples)]
        row = {"workload": self.workload.name, "backend": name, "mode": mode, "ms_median_ci95": interval}
        self.results.intervals.append(row | {"calls": self.calls} | more)


def _refusal(adapter: Contestant, inputs: Inputs) -> str:
    try:
        return adapter.refuses(inputs) or ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"

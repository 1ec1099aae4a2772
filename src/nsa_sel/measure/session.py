"""What the commands `bench` and `decode` do between their options and their files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import nsa_sel
from nsa_sel import backends
from nsa_sel.measure import clock, schema, tune
from nsa_sel.measure.bench import Results, run_bench
from nsa_sel.measure.contestants import GATHERED, OWN, own_contestants
from nsa_sel.measure.decode import facts_of, rows_of, time_step
from nsa_sel.measure.decode_step import DecodeStep, Shape
from nsa_sel.measure.environment import device_columns, environment, tf32_off
from nsa_sel.measure.peers import PEERS, load_peers, peers_folder
from nsa_sel.measure.record import write_atomically
from nsa_sel.measure.store import csv_text, load_bench, save_bench
from nsa_sel.measure.timed import Settings
from nsa_sel.measure.workload import Workload

MAX_REASON = 200  # characters of a reason that are printed; the JSON has all of it


def device_of(name: str) -> torch.device:
    """Return the device called `name`, with its index; by default the first GPU, else the CPU.

    Raises:
        ValueError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of the {torch.cuda.device_count()} CUDA devices here, got {name!r}")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def default_suites(device: torch.device) -> list[str]:
    """Return the suites of a run that names none: everything on a GPU, the small one on a CPU."""
    return ["plan", "decode", "models"] if device.type == "cuda" else ["ci"]


class BenchSession:
    """One run of the microbenchmark."""

    def __init__(
        self,
        device: torch.device,
        modes: list[str] | None,
        names: list[str] | None,
        peers: Path | None,
        seed: int,
        iters: int,
        warmup: int,
    ) -> None:
        tf32_off()
        self.notes: list[str] = []
        chosen = tuple(dict.fromkeys(modes or [m for m in clock.MODES if clock.refused_mode(m, device) is None]))
        for mode in chosen:
            reason = clock.refused_mode(mode, device)
            if mode not in clock.MODES:
                raise ValueError(f"mode: {reason}")
            if reason:
                self.notes.append(f"{reason}: its rows say that nothing ran")
        names = list(dict.fromkeys(names or [*OWN, GATHERED, *PEERS]))
        if unknown := [name for name in names if name not in (*OWN, GATHERED, *PEERS)]:
            raise ValueError(f"backend: expected {', '.join((*OWN, GATHERED, *PEERS))}, got {', '.join(unknown)}")
        if schema.BASELINE not in names:
            names.append(schema.BASELINE)
            self.notes.append("sdpa runs too: without it nothing has a speed-up")
        found, self.absent = load_peers([name for name in names if name in PEERS], peers_folder(peers))
        for reason in dict.fromkeys(self.absent.values()):
            alike = ", ".join(name for name, why in self.absent.items() if why == reason)
            self.notes.append(f"not measured, peers {alike}: {reason}")
        self.contestants = [*own_contestants(names), *found]
        self.settings = Settings(device, chosen, seed, iters, warmup)
        self.results = Results()

    def run(
        self, workloads: list[Workload], out: Path, seconds: float | None, resume: bool, every: float
    ) -> Iterator[str]:
        """Measure `workloads`, write the files every few seconds and at the end; yields the names of what is done."""
        settings = self.settings
        device = device_columns(settings.device)
        how = {
            "seed": settings.seed,
            "iters": settings.iters,
            "warmup": settings.warmup,
            "modes": list(settings.modes),
            "backends": [contestant.name for contestant in self.contestants],
        }
        if resume:
            self.results = load_bench(out, device, how)
        done = {row["workload"] for row in self.results.rows}
        facts = environment(settings.device, **how, peers_absent=self.absent, done_before=len(done))
        yield from (w.name for w in workloads if w.name in done)
        written = time.monotonic()
        try:
            left = [w for w in workloads if w.name not in done]
            for name in run_bench(left, self.contestants, settings, self.results, seconds):
                if time.monotonic() - written > every:
                    save_bench(out, self.results, facts)
                    written = time.monotonic()
                yield name
        finally:
            save_bench(out, self.results, facts)

    def summary(self) -> list[str]:
        """Return lines for the user: what was measured, and each different reason why something was not."""
        rows = self.results.rows
        ran = [row for row in rows if row["ran"] == row["backend"]]
        lines = [f"{len(ran)} of {len(rows)} rows were measured"]
        reasons: dict[tuple[str, str], int] = {}
        for one in self.results.not_measured:
            key = (one["backend"], one["reason"])
            reasons[key] = reasons.get(key, 0) + 1
        for (backend, reason), count in reasons.items():
            lines.append(f"NOT MEASURED {backend} ({count} times): {' '.join(reason.split())[:MAX_REASON]}")
        for reason in sorted(set(self.results.skipped.values())):
            names = [name for name, why in self.results.skipped.items() if why == reason]
            lines.append(f"skipped {len(names)} workloads ({names[0]}, ...): {reason}")
        return lines


class TuneSession:
    """One sweep over the Triton backend's settings.

    Raises:
        ValueError: the mode cannot be had on this device.
    """

    def __init__(self, device: torch.device, modes: list[str] | None, seed: int, iters: int, warmup: int) -> None:
        tf32_off()
        self.backend: tune.Tunable = backends.get("triton")  # type: ignore[assignment]
        mode = modes[0] if modes else ("graph" if device.type == "cuda" else "eager")
        if reason := clock.refused_mode(mode, device):
            raise ValueError(f"mode: {reason}")
        self.settings = Settings(device, (mode,), seed, iters, warmup)

    def run(self, workloads: list[Workload], out: Path) -> Iterator[str]:
        """Sweep `workloads` and write tune_triton.csv and tune_triton.json; yields the names of what is done."""
        settings, rows = self.settings, list[dict[str, Any]]()
        yield from tune.sweep(workloads, self.backend, settings, rows)
        how = {"seed": settings.seed, "iters": settings.iters, "warmup": settings.warmup, "modes": list(settings.modes)}
        data = {"environment": environment(settings.device, **how), "best": tune.best_by_bucket(rows, "triton")}
        write_atomically(out / "tune_triton.json", json.dumps(data, indent=1) + "\n")
        write_atomically(out / tune.FILE, csv_text(tune.COLUMNS, rows))


class DecodeSession:
    """One run of the decode benchmark."""

    def __init__(
        self,
        device: torch.device,
        contexts: list[int] | None,
        batches: list[int] | None,
        backend: str,
        mode: str,
        leave_out: tuple[str, ...],
        seed: int,
        iters: int,
        warmup: int,
    ) -> None:
        tf32_off()
        on_gpu = device.type == "cuda"
        self.device, self.seed, self.iters, self.warmup, self.leave_out = device, seed, iters, warmup, leave_out
        self.mode = mode or ("graph" if on_gpu else "eager")
        contexts = contexts or ([4096, 8192, 16384, 32768, 65536] if on_gpu else [4096])
        self.steps = [(b, c) for b in batches or ([1, 8, 64] if on_gpu else [1]) for c in contexts]
        self.rows: list[dict[str, Any]] = []
        self.facts: list[dict[str, Any]] = []
        self.notes: list[str] = ["projections and the MLP are no part of this step: shares are of the attention alone"]
        self.backend, why = selecting_backend(backend, device)
        if why:
            self.notes.append(why)
        dense = sorted({c for c in contexts if c <= Shape().dense_until()})
        if dense:
            listed = ", ".join(map(str, dense))
            self.notes.append(f"nothing is sparse yet at context {listed}: the selection holds every token")
        if leave_out:
            self.notes.append(f"left out: {', '.join(leave_out)}; the gate takes no such file")

    def run(self, out: Path) -> Iterator[str]:
        """Measure every step and write decode.csv and decode.json; yields a name for each step done."""
        how = {"seed": self.seed, "iters": self.iters, "warmup": self.warmup, "mode": self.mode}
        how |= {"leave_out": list(self.leave_out)}
        for batch, context in self.steps:
            try:
                self._measure(batch, context)
            except torch.OutOfMemoryError:
                self.notes.append(f"not measured: no memory for B={batch}, context={context}")
            data = {"environment": environment(self.device, **how), "steps": self.facts, "notes": self.notes}
            write_atomically(out / "decode.json", json.dumps(data, indent=1) + "\n")
            write_atomically(out / "decode.csv", csv_text(schema.DECODE_COLUMNS, self.rows))
            yield f"B={batch} context={context}"

    def _measure(self, batch: int, context: int) -> None:
        step = DecodeStep(batch, context, self.backend, self.device, self.seed, self.leave_out)
        times = time_step(step, self.mode, self.device, self.iters, self.warmup)
        facts = facts_of(step, times)
        self.rows += rows_of(step, times, self.device)
        self.facts.append(facts)

    def table(self) -> Table:
        """Return a table of the steps: milliseconds, shares and the residual."""
        table = Table(
            "B", "context", "step ms", *schema.STAGES, "residual", "select ran", title="decode step: shares by stage"
        )
        for fact in self.facts:
            mine = {r["stage"]: r for r in self.rows if (r["B"], r["context"]) == (fact["B"], fact["context"])}
            shares = [f"{float(mine[stage]['share']):.1%}" for stage in schema.STAGES]
            step = [str(fact["B"]), str(fact["context"]), f"{fact['step_ms']:.4g}", *shares]
            table.add_row(*step, f"{fact['residual']:.1%}", mine["select"]["ran"] or "nothing")
        return table


def selecting_backend(name: str, device: torch.device) -> tuple[str, str]:
    """Return the backend of the selection and, where it was not the one to measure, why not."""
    if name:
        if name not in OWN:
            raise ValueError(f"backend: expected {', '.join(OWN)}, got {name!r}")
        return name, ""
    tiny = DecodeStep(1, 1024, "cuda", device)
    try:
        nsa_sel.explain(tiny.q[:, None], tiny.k_sel, tiny.v_sel, block_indices=tiny.ids, block_size=64, backend="cuda")
    except RuntimeError as error:
        return "sdpa", f"the selection runs on sdpa, which decides nothing about the kernel: {error}"
    return "cuda", ""

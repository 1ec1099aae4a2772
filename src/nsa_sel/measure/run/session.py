"""What the commands `bench` and `decode` do between their options and their files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import nsa_sel
from nsa_sel.measure import schema
from nsa_sel.measure.files import write_results
from nsa_sel.measure.run import clock, store
from nsa_sel.measure.run.bench import NOT_STARTED, Results, run_bench
from nsa_sel.measure.run.contestants import contestants
from nsa_sel.measure.run.decode import facts_of, rows_of, time_steps
from nsa_sel.measure.run.decode_step import DecodeStep, Shape
from nsa_sel.measure.run.environment import device_columns, environment, tf32_off
from nsa_sel.measure.run.peers import PEERS, Peer, load_peers, peers_folder
from nsa_sel.measure.run.race import CLOCK_DRIFT, Settings, drift
from nsa_sel.measure.run.workload import Workload

MAX_REASON = 200  # characters of a reason that are printed; the JSON has all of it
Lines = list[tuple[str, ...]]


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
    """One run of the microbenchmark; no mode in `settings` stands for all that the device has."""

    def __init__(
        self, settings: Settings, names: list[str] | None, peers: Path | None, out: Path, resume: bool
    ) -> None:
        tf32_off()
        self.out, self.notes = out, list[str]()
        device = settings.device
        modes = settings.modes or tuple(m for m in schema.MODES if clock.refused_mode(m, device) is None)
        for mode in modes:
            reason = clock.refused_mode(mode, device)
            if mode not in schema.MODES:
                raise ValueError(f"mode: {reason}")
            if reason:
                self.notes.append(f"{reason}: its rows say that nothing ran")
        self.settings = replace(settings, modes=tuple(dict.fromkeys(modes)))
        names = list(dict.fromkeys(names or [*schema.HERE, *PEERS]))
        if unknown := [name for name in names if name not in (*schema.HERE, *PEERS)]:
            raise ValueError(f"backend: expected {', '.join((*schema.HERE, *PEERS))}, got {', '.join(unknown)}")
        if schema.BASELINE not in names:
            names.append(schema.BASELINE)
            self.notes.append("sdpa runs too: without it nothing has a speed-up")
        folder = peers_folder(peers)
        adapters, absent = load_peers([name for name in names if name in PEERS], folder)
        for reason in dict.fromkeys(absent.values()):
            alike = ", ".join(name for name, why in absent.items() if why == reason)
            self.notes.append(f"not measured, peers {alike}: {reason}")
        self.contestants = contestants(names)
        self.peers = [(one, Peer(one.name, folder, self.settings)) for one in adapters] if folder else []
        how = {name: getattr(self.settings, name) for name in ("seed", "iters", "warmup")}
        how |= {"modes": list(self.settings.modes), "backends": [c.name for c in (*self.contestants, *adapters)]}
        if resume:
            self.results = store.load(out, device_columns(device), how)
        else:
            store.refuse_finished(out)
            self.results = Results()
        self.facts = environment(device, **how, peers_absent=absent, done_before=len(self.results.workloads))

    def run(self, workloads: list[Workload], seconds: float | None, every: float) -> Iterator[str]:
        """Measure `workloads`, write the files every few seconds and at the end; yields the names of what is done."""
        yield from (w.name for w in workloads if w.name in self.results.workloads)
        left = [w for w in workloads if w.name not in self.results.workloads]
        written = time.monotonic()
        whole = False
        try:
            for name in run_bench(left, self.contestants, self.peers, self.settings, self.results, seconds):
                if time.monotonic() - written > every:
                    store.save(self.out, self.results, self.facts, finished=False)
                    written = time.monotonic()
                yield name
            whole = not any(why.startswith(NOT_STARTED) for why in self.results.skipped.values())
        finally:
            for _, peer in self.peers:
                peer.close()
            store.save(self.out, self.results, self.facts, finished=whole)

    def summary(self) -> list[str]:
        """Return lines for the user: what was measured, and each different reason why something was not."""
        rows = self.results.rows
        lines = [f"{sum(row['ran'] == row['backend'] for row in rows)} of {len(rows)} rows were measured"]
        reasons = Counter((one["backend"], one["reason"]) for one in self.results.not_measured)
        for (backend, reason), count in reasons.items():
            lines.append(f"NOT MEASURED {backend} ({count} times): {' '.join(reason.split())[:MAX_REASON]}")
        for reason in sorted(set(self.results.skipped.values())):
            names = [name for name, why in self.results.skipped.items() if why == reason]
            lines.append(f"skipped {len(names)} workloads ({names[0]}, ...): {reason}")
        return lines

    def table(self) -> Lines:
        """Return the table to print, its header first: by backend and mode, what was measured and how it compares."""
        lines: Lines = [("backend", "mode", "rows", "ms (median)", "speed-up", "of the ceiling", "MAE")]
        for backend, mode in dict.fromkeys((row["backend"], row["mode"]) for row in self.results.rows):
            rows = [row for row in self.results.rows if (row["backend"], row["mode"]) == (backend, mode)]
            ran = [row for row in rows if row["ran"] == backend]
            cells = []
            for column in ("ms_median", "speedup", "ceiling_share"):
                values = [float(row[column]) for row in ran if row[column] != ""]
                cells.append(f"{median(values):.4g}" if values else "")
            worst = f"{max(float(row['mae']) for row in ran):.2g}" if ran else schema.NOT_MEASURED
            lines.append((backend, mode, f"{len(ran)} of {len(rows)}", *cells, worst))
        return lines


class DecodeSession:
    """One run of the decode benchmark; without a mode in `settings`, the best that the device has."""

    def __init__(
        self,
        settings: Settings,
        contexts: list[int] | None = None,
        batches: list[int] | None = None,
        backend: str = "",
        leave_out: tuple[str, ...] = (),
    ) -> None:
        tf32_off()
        self.settings, self.leave_out = settings, leave_out
        on_gpu = settings.device.type == "cuda"
        self.mode = settings.modes[0] if settings.modes else "graph" if on_gpu else "eager"
        contexts = contexts or ([4096, 8192, 16384, 32768, 65536] if on_gpu else [4096])
        self.steps = [(b, c) for b in batches or ([1, 8, 64] if on_gpu else [1]) for c in contexts]
        self.rows: list[dict[str, Any]] = []
        self.facts: list[dict[str, Any]] = []
        self.clocks: list[dict[str, Any]] = []
        self.notes = ["projections and the MLP are no part of this step: shares are of the attention alone"]
        kernel, why = selecting_backend(backend, settings.device)
        self.backends = dict.fromkeys([schema.BASELINE, kernel])  # before any kernel first: that decides the share
        self.notes += [why] if why else []
        if dense := ", ".join(str(c) for c in sorted(set(contexts)) if c <= Shape().dense_until()):
            self.notes.append(f"nothing is sparse yet at context {dense}: the selection holds every token")
        if leave_out:
            self.notes.append(f"left out: {', '.join(leave_out)}; the gate takes no such file")

    def run(self, out: Path) -> Iterator[str]:
        """Measure every step and write decode.csv and decode.json; yields a name for each step done."""
        how = {"seed": self.settings.seed, "iters": self.settings.iters, "warmup": self.settings.warmup}
        facts = environment(self.settings.device, **how, mode=self.mode, leave_out=list(self.leave_out))
        for at, (batch, context) in enumerate(self.steps, 1):
            try:
                self._measure(batch, context)
            except torch.OutOfMemoryError:
                self.notes.append(f"not measured: no memory for B={batch}, context={context}")
            data: dict[str, Any] = {"environment": facts, "steps": self.facts, "clocks": self.clocks}
            data |= {"notes": self.notes, "finished": {"rows": len(self.rows)} if at == len(self.steps) else None}
            write_results(out / "decode.csv", schema.DECODE_COLUMNS, self.rows, data)
            yield f"B={batch} context={context}"

    def _measure(self, batch: int, context: int) -> None:
        how, (base, *others) = self.settings, self.backends
        first = DecodeStep(batch, context, base, how.device, how.seed, self.leave_out)
        steps = [first, *map(first.with_backend, others)]
        for _ in range(3):  # clocks that drift are measured again, twice at most
            times, read = time_steps(steps, self.mode, how.device, how.iters, how.warmup)
            if drift(*read) <= CLOCK_DRIFT:
                break
        self.rows += rows_of(steps, times, how.device)
        self.facts.append(facts_of(steps, times))
        if all(read):
            self.clocks.append({"B": batch, "context": context, "before": read[0], "after": read[1]})

    def table(self) -> Lines:
        """Return the table to print, its header first: milliseconds, shares and the residual of each step."""
        lines: Lines = [("B", "context", "step ms", *schema.STAGES, "residual", "with the kernel", "1/(1-s+s/x)")]
        for fact in self.facts:
            mine = [row for row in self.rows if (row["B"], row["context"]) == (fact["B"], fact["context"])]
            shares = {r["stage"]: float(r["share"]) for r in mine if r["backend"] in (schema.TORCH, schema.BASELINE)}
            faster = [one for name, one in fact.items() if name.startswith("speedup of")]
            lines.append(
                (str(fact["B"]), str(fact["context"]), f"{fact['step_ms']:.4g}",
                 *(f"{shares[stage]:.1%}" for stage in schema.STAGES), f"{fact['residual']:.1%}",
                 ", ".join(f"{one['step']:.2f}x" for one in faster) or schema.NOT_MEASURED,
                 ", ".join(f"{one['expected']:.2f}x" for one in faster))
            )  # fmt: skip
        return lines


def selecting_backend(name: str, device: torch.device) -> tuple[str, str]:
    """Return the backend of the selection and, where it was not the one to measure, why not."""
    if name:
        if name not in schema.OWN:
            raise ValueError(f"backend: expected {', '.join(schema.OWN)}, got {name!r}")
        return name, ""
    tiny = DecodeStep(1, 1024, "cuda", device)
    try:
        nsa_sel.explain(tiny.q[:, None], tiny.k_sel, tiny.v_sel, block_indices=tiny.ids, block_size=64, backend="cuda")
    except RuntimeError as error:
        return "sdpa", f"the selection runs on sdpa, which decides nothing about the kernel: {error}"
    return "cuda", ""

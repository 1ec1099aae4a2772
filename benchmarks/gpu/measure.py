"""The benchmarks and the judgements of the GPU validation run, by the functions behind the `nsa-sel` commands.

Those commands need a package for the command line that a GPU machine may lack. In the dry form everything runs on the
CPU on small shapes, and every time is left empty.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.runner import MORE, TELLS, arguments, finish
from nsa_sel.measure import schema
from nsa_sel.measure.files import read_json, read_rows, write_atomically, write_results
from nsa_sel.measure.judge import gate, threshold
from nsa_sel.measure.judge.rules import load_rules
from nsa_sel.measure.report import record
from nsa_sel.measure.run.bench import NOT_STARTED
from nsa_sel.measure.run.race import ContextLostError, Settings
from nsa_sel.measure.run.session import BenchSession, DecodeSession, device_of
from nsa_sel.measure.run.workload import Workload, load_suites

FOLDER = Path(__file__).resolve().parent
CHUNK_SECONDS = 400.0  # after which bench starts no further workload; the rest of ten minutes is for the last one
BENCH_TIMES = tuple(name for name in schema.BENCH_FIGURES if name not in ("mae", "max_err"))


def emptied(path: Path, columns: tuple[str, ...], times: tuple[str, ...]) -> None:
    """Leave out every time in a CSV file and in the JSON beside it: a CPU's times are nobody's."""
    data = read_json(path.with_suffix(".json"))
    kept = ("environment", "workloads", "not_measured", "skipped", "notes", "finished")
    dry = {"dry": "NOT MEASURED: no GPU, times left out"}
    rows = [row | dict.fromkeys(times, "") for row in read_rows(path)]
    write_results(path, columns, rows, {name: data[name] for name in kept if name in data} | dry)


def settings_of(dry: bool, modes: tuple[str, ...] = ()) -> Settings:
    """Return how everything is measured."""
    return Settings(device_of("cpu" if dry else ""), modes, iters=1 if dry else 50, warmup=0 if dry else 5)


def run_bench(out: Path, workloads: list[Workload], dry: bool, resume: bool, **more: Any) -> BenchSession:
    """Run the benchmark into `out`; what broke the CUDA context is told, and kept for the run that goes on."""
    run = BenchSession(settings_of(dry, more.get("modes", ())), more.get("names"), FOLDER.parent / "peers", out, resume)
    try:
        told(run.run(workloads, more.get("seconds"), every=10.0))
    except ContextLostError as error:
        print(f"{TELLS}{error.args[0]}; the rest in a new process", flush=True)
        sys.exit(MORE)
    finally:
        print("\n".join([*run.notes, *run.summary()]), flush=True)
    if dry:
        emptied(out / "bench.csv", schema.BENCH_COLUMNS, BENCH_TIMES)
    return run


def bench(options: argparse.Namespace) -> None:
    """The matrix with every peer that is there, a chunk at a time; exit status 3 while there is more to do."""
    out = options.out
    key = out / "steps" / "bench-began.json"  # a chunk goes on only from what the same sources on the same GPU began
    resume = key.exists() and key.read_text(encoding="utf-8") == options.identity and (out / "bench.csv").exists()
    if not resume:
        for name in ("bench.csv", "bench.json"):
            (out / name).unlink(missing_ok=True)
    write_atomically(key, options.identity)
    workloads = load_suites(["ci"] if options.small or options.dry else ["plan", "decode", "models"])
    names = [*schema.HERE, *options.peers.split(",")]
    seconds = min(CHUNK_SECONDS, max(30.0, options.seconds - 150))
    run = run_bench(
        out, workloads[: 3 if options.dry else None], options.dry, resume, seconds=seconds,
        names=[name for name in names if name] if options.peers else None,
    )  # fmt: skip
    done, late = len(run.results.workloads), [w for w in run.results.skipped.values() if w.startswith(NOT_STARTED)]
    if late:
        print(f"{TELLS}{done} workloads are done, {len(late)} left")
        sys.exit(MORE)
    failures = run.results.parity_failures
    finish(
        bool(failures), options.dry, f"{done} workloads, {len(failures)} wrong, {len(run.results.skipped)} do not fit"
    )


def again(options: argparse.Namespace) -> None:
    """A few shapes in a run of their own, to compare with bench.csv: again.csv."""
    part = options.out / "part"
    shutil.rmtree(part, ignore_errors=True)
    workloads = load_suites(["ci"])[:1] if options.dry else load_suites([str(FOLDER / "again.toml")])
    run = run_bench(
        part, workloads, options.dry, False, names=["cuda", "sdpa"], modes=("eager" if options.dry else "graph",)
    )
    for name in ("bench.csv", "bench.json"):
        (part / name).replace(options.out / name.replace("bench", "again"))
    shutil.rmtree(part)
    finish(bool(run.results.parity_failures), options.dry, f"{len(run.results.rows)} rows")


def decode(options: argparse.Namespace) -> None:
    """The decode step by stages, with packed SDPA and with the kernel."""
    small = options.dry or options.small
    contexts, batches = ([2048], [1]) if small else (None, None)
    run = DecodeSession(settings_of(options.dry), contexts, batches)
    told(run.run(options.out))
    if options.dry:
        emptied(options.out / "decode.csv", schema.DECODE_COLUMNS, schema.DECODE_FIGURES)
    print("\n".join(run.notes))
    finish(not run.facts, options.dry, f"{len(run.facts)} of {len(run.steps)} steps")


def judge(options: argparse.Namespace) -> None:
    """threshold or gate: the verdict is the outcome's sentence; without a verdict it is NOT MEASURED."""
    out, rules = options.out, load_rules()
    if options.what == "threshold":
        found = threshold.threshold_of_files([out / "bench.csv"], rules, "cuda")
        write_atomically(out / "threshold.md", threshold.threshold_page(found, rules, "cuda", ["bench.csv"]))
        verdict = found.verdict
    else:
        judgement = gate.judge(out / "bench.csv", out / "decode.csv", rules)
        verdict = judgement.verdict
        record.write_record(judgement, out)
        record.write_policy(judgement, out / "policy.json")
        print(json.dumps(judgement.to_json(), indent=1))
    unmeasured = verdict == schema.NOT_MEASURED
    # Nothing may pass or fail on data without times.
    finish(options.dry and not unmeasured, unmeasured, f"the verdict is {verdict}")


def report(options: argparse.Namespace) -> None:
    """The page and its pictures."""
    try:
        from nsa_sel.measure.report import page
    except ModuleNotFoundError as error:
        finish(False, True, f"no report: {error.name} is not installed")
    finish(False, options.dry, page.write_report(options.out).name)


def told(names: Iterable[str]) -> None:
    """Say what is done as it is done, so that a log that is cut shows how far it came."""
    for name in names:
        print(name, flush=True)


STEPS = {"bench": bench, "again": again, "decode": decode, "threshold": judge, "gate": judge, "report": report}


def main() -> None:
    """Run one of STEPS: `python -m benchmarks.gpu.measure --out DIR WHAT`."""
    options = arguments(__doc__, "what")
    options.dry = options.dry or not torch.cuda.is_available()
    STEPS[options.what](options)


if __name__ == "__main__":
    main()

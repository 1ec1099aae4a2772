"""The GPU validation run: `make gpu OUT=dir`, or `python -m benchmarks.gpu --out dir`. Standard library only.

Exit status: 0 where every step passed (dry form: did what it can), 1 where one failed, 2 where one is not measured or
not finished. The same command again goes on where it stopped: a finished step leaves a marker and is skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks.gpu import machine
from benchmarks.gpu.runner import DRY, FAIL, FINISHED, NOT_MEASURED, PARTIAL, PASS, Outcome, Runner, Settings

LEAST_SECONDS = 20  # with less than this left nothing is started
GPU_TESTS = ("tests/gpu/test_calls.py", "tests/gpu/test_sdpa.py", "tests/gpu/test_measure.py")
SUITE = ("tests/contract/test_parity.py", "tests/contract/test_contract.py")
# Without a GPU the kernel's source stands in on a part of the common suite; the project's own tests run all of it.
STAND_IN = "host-run-sm90 and (dims- or pages- or garbage or invariant or lse)"
STAND_IN_SMALL = "host-run-sm90 and (dims-192x128 or pages-16 or invariant or lse)"


class Step(NamedTuple):
    """One step; `always`: it judges what others have left, so it is never out of date by itself."""

    name: str
    run: Callable[[Runner], Outcome]
    always: bool = False


def environment(runner: Runner) -> Outcome:
    """GPU, clocks, driver, versions, commit: environment.json."""
    found = machine.environment(runner.settings.dry, runner.settings.small)
    (runner.settings.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if machine.gpu() is None:
        return Outcome(DRY if runner.settings.dry else FAIL, "no GPU: nvidia-smi names none")
    return Outcome(PASS, f"{machine.gpu_name()}, torch {found['packages']['torch']}, commit {found['commit']}")


def build(runner: Runner) -> Outcome:
    """The package for this machine's own architecture, without network, and a look at what was built."""
    settings = runner.settings
    machine.make_env(settings.env)
    for command, variables in machine.install_commands(settings.env, settings.wheels, settings.dry):
        code, said = runner.command(command, variables)
        if code != 0:
            return runner.outcome(code if code == 124 else 1, said)
    code, said = runner.command(
        [str(settings.python), "-m", "benchmarks.gpu.machine", "dry" if settings.dry else "gpu"]
    )
    if code == 0:
        machine.stamp(settings.env).write_text(machine.digest(), encoding="utf-8")
    if settings.dry and code == 0:
        return Outcome(DRY, f"built without kernels: {said.strip()}")
    return runner.outcome(code, said)


def on_pytest(
    *paths: str, chosen: tuple[str, ...] = (), dry: tuple[str, ...] | None = None, small: str = ""
) -> Callable[[Runner], Outcome]:
    """Return a step that runs tests on this machine's GPU; a skip there is a failure.

    `chosen`: pytest's options. `dry`: those of the dry form, where the emulator stands in; None where nothing can, and
    every test is skipped for want of a GPU.
    """

    def run(runner: Runner) -> Outcome:
        settings = runner.settings
        options = chosen if not settings.dry or dry is None else ("-k", small) if settings.small and small else dry
        junit = settings.out / f"{runner.name}.xml"
        junit.unlink(missing_ok=True)
        # Warnings of a machine that this project was not developed on are not the kernel's mistakes.
        command = [str(settings.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
        variables = {"NSA_SEL_SMALL": "1"} if settings.small else {}
        code, said = runner.command([*command, f"--junitxml={junit}", *options, *paths], variables)
        counts, rows = Counter[str](), []
        for case in ElementTree.parse(junit).iter("testcase") if junit.exists() else ():
            ended = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            verdict = "passed" if ended is None else "skipped" if ended.tag == "skipped" else "failed"
            counts[verdict] += 1
            reason = "" if ended is None else " ".join((ended.get("message") or "").split())[:200]
            rows.append([f"{case.get('classname')}::{case.get('name')}", verdict, case.get("time"), reason])
        junit.unlink(missing_ok=True)
        with (settings.out / f"{runner.name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["test", "verdict", "seconds", "reason"], *rows])
        told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "nothing was collected"
        if code == 124:
            return runner.outcome(code, said)
        if not settings.dry and counts["skipped"] == sum(counts.values()) > 0:
            return Outcome(NOT_MEASURED, f"{told}: {rows[0][3]}")
        # A test that is skipped on the machine that it was written for has shown nothing.
        shown = counts["passed"] > 0 and counts["skipped"] == 0
        if code != 0 or counts["failed"] or not (shown or (settings.dry and dry is None and counts["skipped"])):
            return Outcome(FAIL, f"{told} (pytest ended with {code})")
        return Outcome(DRY, f"{told}; NOT MEASURED on a GPU") if settings.dry else Outcome(PASS, told)

    return run


def module(name: str, *arguments: str) -> Callable[[Runner], Outcome]:
    """Return a step that is a module of its own, whose exit status and last line are the outcome."""

    def run(runner: Runner) -> Outcome:
        settings = runner.settings
        flags = [flag for flag, on in (("--dry", settings.dry), ("--small", settings.small)) if on]
        identity = json.dumps(machine.identity(settings.dry, settings.small))
        more = ["--seconds", f"{runner.left:.0f}", "--identity", identity]
        more += ["--peers", settings.peers] if settings.peers else []
        command = [str(settings.python), "-m", f"benchmarks.gpu.{name}", "--out", str(settings.out), *flags]
        return runner.outcome(*runner.command([*command, *(more if name == "measure" else []), *arguments]))

    return run


STEPS = [
    Step("environment", environment, always=True),
    Step("build", build),
    Step("gpu_tests", on_pytest(*GPU_TESTS, chosen=("-m", "gpu"))),
    Step("parity", on_pytest(*SUITE, chosen=("-k", "cuda or sdpa-on-gpu"), dry=("-k", STAND_IN), small=STAND_IN_SMALL)),
    Step("memcheck", on_pytest("tests/gpu/test_sanitizer.py", chosen=("-m", "gpu", "-k", "memcheck"))),
    Step("racecheck", on_pytest("tests/gpu/test_sanitizer.py", chosen=("-m", "gpu", "-k", "racecheck"))),
    Step("twins", on_pytest("tests/gpu/test_twins.py", dry=())),
    Step("replays", on_pytest("tests/gpu/test_replay.py", chosen=("-m", "gpu or not gpu"), dry=("-m", "not gpu"))),
    Step("ceilings", module("ceilings")),
    Step("bench", module("measure", "bench")),
    Step("again", module("measure", "again")),
    Step("decode", module("measure", "decode")),
    Step("threshold", module("measure", "threshold"), always=True),
    Step("gate", module("measure", "gate"), always=True),
    Step("report", module("measure", "report"), always=True),
    Step("summary", module("summary"), always=True),
]


def run_steps(steps: list[Step], settings: Settings) -> dict[str, Outcome]:
    """Run the steps in order and return what came of each; one that fails or is cut does not stop the others."""
    outcomes: dict[str, Outcome] = {}
    for step in steps:
        before = settings.read_marker(step.name)
        if before and before["status"] in FINISHED and not step.always and not settings.force:
            outcomes[step.name] = Outcome(before["status"], before["reason"])
            print(f"{before['status']:>12}  {step.name}: done before, {before['seconds']} s", flush=True)
            continue
        while True:
            if settings.left < LEAST_SECONDS:
                outcome = Outcome(PARTIAL, "no time left: run the same command again")
                break
            runner = Runner(settings, step.name)
            settings.write_marker(step.name, Outcome(PARTIAL, "began and did not end"), runner)
            try:
                outcome = step.run(runner)
            except Exception as error:
                outcome = Outcome(FAIL, f"{type(error).__name__}: {error}")
            settings.write_marker(step.name, outcome, runner)
            if outcome.status != PARTIAL or outcome.reason.startswith("cut"):
                break
        outcomes[step.name] = outcome
        print(f"{outcome.status:>12}  {step.name}: {outcome.reason}", flush=True)
    return outcomes


def pack(out: Path, target: Path) -> None:
    """Put the folder of results into one file: some ways of bringing results home take only a few."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(p for p in out.rglob("*") if p.is_file() and p.resolve() not in (target, part)):
            archive.add(path, path.relative_to(out))
    part.replace(target)


def main() -> int:
    """Run the steps and return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--env", type=Path, default=machine.ROOT / "build/gpu/env", help="environment to build into")
    parser.add_argument("--dry", action="store_true", help="no GPU: the emulator stands in, times stay empty")
    parser.add_argument("--small", action="store_true", help="few and small shapes")
    parser.add_argument("--force", action="store_true", help="run finished steps again, bench from its beginning")
    parser.add_argument("--steps", default="", help=f"some of {', '.join(step.name for step in STEPS)}")
    parser.add_argument("--peers", default="", help="peers to measure, with commas; by default all that are installed")
    parser.add_argument("--wheels", type=Path, help="folder of wheels: what this machine lacks, and peers")
    parser.add_argument("--seconds", type=float, help="end after so many seconds; the same command goes on from there")
    parser.add_argument("--pack", default="", help="put the results into one file: 1 for OUT.tar.gz, or its path")
    given = parser.parse_args()
    known = {step.name: step for step in STEPS}
    wanted = [name.strip() for name in given.steps.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"STEPS: expected {', '.join(known)}, got {', '.join(unknown)}")
    out = given.out.absolute()
    ends = time.monotonic() + given.seconds if given.seconds else float("inf")
    wheels = given.wheels.absolute() if given.wheels else None
    settings = Settings(out, given.env.absolute(), given.dry, given.small, given.force, wheels, given.peers, ends)
    target = out.with_name(f"{out.name}.tar.gz") if given.pack == "1" else Path(given.pack).absolute()
    if given.pack and target.is_file() and not (out / "steps").exists():  # only the packed file was kept
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target) as archive:
            archive.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    out.mkdir(parents=True, exist_ok=True)
    if given.force:
        (out / "steps" / "bench-began.json").unlink(missing_ok=True)
    if not machine.built(settings.env):  # another machine, or other sources: what was built is not here
        settings.marker("build").unlink(missing_ok=True)
    print(f"{machine.commit()} (sources {machine.digest()}) into {out}", flush=True)
    outcomes = run_steps([step for step in STEPS if not wanted or step.name in wanted], settings)
    shutil.rmtree(out / "part", ignore_errors=True)
    if given.pack:
        pack(out, target)
        print(f"packed into {target}")
    statuses = {outcome.status for outcome in outcomes.values()}
    return 1 if FAIL in statuses else 2 if statuses & {NOT_MEASURED, PARTIAL} else 0


if __name__ == "__main__":
    sys.exit(main())

"""The steps of the round, in their order. Standard library only."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu import install, machine
from benchmarks.gpu.common import FAIL, PASS, ROOT
from benchmarks.gpu.round import DRY, Outcome, Runner, Step

COMMON_SUITE = ("tests/contract/test_parity.py", "tests/contract/test_contract.py")
# Without a GPU the kernel's source stands in on a part of the common suite; the project's own tests run all of it.
STAND_IN = "host-run-sm90 and (dims- or pages-)"
STAND_IN_SMALL = "host-run-sm90 and (dims-192x128 or pages-16)"


def environment(runner: Runner) -> Outcome:
    """GPU, clocks, driver, versions, commit: environment.json."""
    settings = runner.settings
    found = machine.environment(settings.dry, settings.small)
    (settings.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    name = (machine.gpu() or {}).get("name")
    if name is None:
        return Outcome(DRY if settings.dry else FAIL, "no GPU: nvidia-smi names none")
    return Outcome(PASS, f"{name}, torch {found['packages']['torch']}, commit {found['commit']}")


def build(runner: Runner) -> Outcome:
    """The package for this machine's own architecture, without network, and a look at what was built."""
    settings = runner.settings
    install.make_env(settings.env)
    for command, variables in install.install_commands(settings.env, settings.wheels, settings.dry):
        code, said = runner.command(command, variables)
        if code != 0:
            return runner.outcome(code if code == 124 else 1, said)
    python = str(install.python_of(settings.env))
    code, said = runner.command([python, "-m", "benchmarks.gpu.install", "dry" if settings.dry else "gpu"])
    if code == 0:
        stamp(settings.env).write_text(machine.digest(), encoding="utf-8")
    if settings.dry and code == 0:
        return Outcome(DRY, f"built without kernels: {said.strip()}")
    return runner.outcome(code, said)


def stamp(env: Path) -> Path:
    """Return the file that says which sources an environment was built from."""
    return env / "built_from.txt"


def built(env: Path) -> bool:
    """Return whether the environment holds these sources' build: a marker may outlive the machine it was made on."""
    return stamp(env).exists() and stamp(env).read_text(encoding="utf-8") == machine.digest()


def _pytest(runner: Runner, *arguments: str) -> tuple[int, str, Counter[str]]:
    """Run pytest in the environment, add its tests to tests.csv, and return exit status, output and counts."""
    junit = runner.settings.out / f"{runner.name}.xml"
    junit.unlink(missing_ok=True)
    python = str(install.python_of(runner.settings.env))
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--junitxml={junit}", *arguments]
    code, said = runner.command(command)
    counts: Counter[str] = Counter()
    rows = []
    for case in ElementTree.parse(junit).iter("testcase") if junit.exists() else ():
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        verdict = "passed" if outcome is None else {"skipped": "skipped"}.get(outcome.tag, "failed")
        counts[verdict] += 1
        reason = "" if outcome is None else " ".join((outcome.get("message") or "").split())[:200]
        rows.append([runner.name, f"{case.get('classname')}::{case.get('name')}", verdict, case.get("time"), reason])
    junit.unlink(missing_ok=True)
    with (runner.settings.out / f"{runner.name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["step", "test", "verdict", "seconds", "reason"], *rows])
    return code, said, counts


def _judged(runner: Runner, code: int, said: str, counts: Counter[str]) -> Outcome:
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "nothing was collected"
    if code == 124:
        return runner.outcome(code, said)
    if code != 0 or not counts or counts["failed"]:
        return Outcome(FAIL, f"{told} (pytest ended with {code})")
    if runner.settings.dry:
        return Outcome(DRY, f"{told}; NOT MEASURED on a GPU")
    # A test that is skipped on the machine that it was written for has shown nothing.
    return Outcome(FAIL if counts["skipped"] or not counts["passed"] else PASS, told)


def gpu_tests(runner: Runner) -> Outcome:
    """Every test that needs a GPU; a skip is a failure."""
    marked = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    return _judged(runner, *_pytest(runner, "-m", "gpu", *(str(p.relative_to(ROOT)) for p in marked)))


def parity(runner: Runner) -> Outcome:
    """The common suite on the kernel and on packed SDPA on the GPU; a skip is a failure."""
    if not runner.settings.dry:
        return _judged(runner, *_pytest(runner, *COMMON_SUITE, "-k", "cuda or sdpa-on-gpu"))
    chosen = STAND_IN_SMALL if runner.settings.small else STAND_IN
    return _judged(runner, *_pytest(runner, COMMON_SUITE[0], "-k", chosen))


def measured(runner: Runner) -> Outcome:
    """One of the steps of measure.py, called like this one."""
    settings = runner.settings
    identity = json.dumps(machine.identity(settings.dry, settings.small))
    return runner.module("measure", runner.name, f"{runner.left:.0f}", identity)


def own_module(runner: Runner) -> Outcome:
    """A step that is a module of this package of its own."""
    return runner.module(runner.name)


STEPS = [
    Step("environment", environment, always=True),
    Step("build", build),
    Step("gpu_tests", gpu_tests),
    Step("parity", parity),
    Step("sanitizer", own_module),
    Step("twins", own_module),
    Step("ceilings", own_module),
    Step("replays", own_module),
    Step("bench", measured),
    Step("again", measured),
    Step("decode", measured),
    Step("threshold", measured, always=True),
    Step("gate", measured, always=True),
    Step("report", measured, always=True),
    Step("summary", own_module, always=True),
]


def chosen(names: str) -> list[Step]:
    """Return the steps called in `names`, with commas; "" means all.

    Raises:
        ValueError: no such step.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {step.name: step for step in STEPS}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"STEPS: expected {', '.join(known)}, got {', '.join(unknown)}")
    return [step for step in STEPS if not wanted or step.name in wanted]


if __name__ == "__main__":
    print(*(step.name for step in STEPS), file=sys.stdout)

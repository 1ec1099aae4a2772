"""Steps that can be run again: each leaves a marker, a finished one is skipped, a failed one stops no other.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.common import FAIL, MORE, NOT_MEASURED, PASS, ROOT, TELLS

DRY = "DRY"  # the dry form of a step did what it can: no evidence of a GPU
PARTIAL = "PARTIAL"  # there is more to do; the next run goes on
FINISHED = (PASS, DRY)
STEP_SECONDS = 570  # every command stays under ten minutes
LEAST_SECONDS = 20  # with less than this left nothing is started


@dataclass
class Outcome:
    """What came of a step."""

    status: str
    reason: str = ""
    commands: list[str] = field(default_factory=list)


@dataclass
class Settings:
    """How the round is run."""

    out: Path
    env: Path
    dry: bool = False
    small: bool = False
    force: bool = False
    wheels: Path | None = None
    ends: float = float("inf")  # monotonic time after which nothing new is started
    timed_out: bool = False

    @property
    def left(self) -> float:
        """Seconds until nothing new is started."""
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class Step:
    """One step: its function returns an Outcome and may call `command`."""

    name: str
    run: Callable[[Runner], Outcome]
    always: bool = False  # judges what others have left, so it is never out of date by itself


class Runner:
    """Runs the commands of one step, with a log and a limit of time."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self.name = name
        self.commands: list[str] = []
        self.log = settings.out / "logs" / f"{name}.log"
        self.deadline = time.monotonic() + min(STEP_SECONDS, settings.left)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")

    @property
    def left(self) -> float:
        """Seconds that this step may still take."""
        return self.deadline - time.monotonic()

    def command(self, arguments: list[str], variables: dict[str, str] | None = None) -> tuple[int, str]:
        """Run a command in the checkout; returns its exit status (124: out of time) and what it printed."""
        text = " ".join([*(f"{name}={value}" for name, value in (variables or {}).items()), *arguments])
        self.commands.append(text)
        kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        with self.log.open("ab") as log:
            log.write(f"$ {text}\n".encode())
            log.flush()
            start = log.tell()
            try:
                child = subprocess.Popen(
                    arguments, cwd=ROOT, env=kept | (variables or {}), stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return 127, str(error)
            try:
                code = child.wait(timeout=max(1.0, self.left))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                code = 124
                self.settings.timed_out = True
            except BaseException:
                os.killpg(child.pid, signal.SIGKILL)
                raise
        with self.log.open("rb") as log:
            log.seek(start)
            return code, log.read().decode(errors="replace")

    def module(self, name: str, *arguments: str, variables: dict[str, str] | None = None) -> Outcome:
        """Run a module of this package in the environment; its exit status is its outcome."""
        flags = [flag for flag, on in (("--dry", self.settings.dry), ("--small", self.settings.small)) if on]
        python = str(self.settings.env / "bin" / "python")
        code, said = self.command(
            [python, "-m", f"benchmarks.gpu.{name}", "--out", str(self.settings.out), *flags, *arguments], variables
        )
        return self.outcome(code, said)

    def outcome(self, code: int, said: str) -> Outcome:
        """Turn exit status and output of a step into its outcome: 0 PASS, 2 NOT MEASURED (the dry form's best)."""
        lines = [line for line in said.strip().splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(TELLS)]
        reason = told[-1].removeprefix(TELLS) if told else lines[-1][:300] if lines else f"exit status {code}"
        if code == 124:
            return Outcome(PARTIAL, f"cut after its time: {reason}")
        if code == MORE:
            return Outcome(PARTIAL, reason)
        if code == 2 and not told:  # a command line that was refused is no absence of a GPU
            return Outcome(FAIL, reason)
        return Outcome({0: PASS, 2: DRY if self.settings.dry else NOT_MEASURED}.get(code, FAIL), reason)


def marker_path(settings: Settings, name: str) -> Path:
    """Return where a step's marker stands."""
    return settings.out / "steps" / f"{name}.json"


def read_marker(settings: Settings, name: str) -> dict[str, Any] | None:
    """Return a step's marker where it is of this commit, these sources, this GPU and these settings, else None."""
    try:
        found = json.loads(marker_path(settings, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = machine.identity(settings.dry, settings.small)
    return found if isinstance(found, dict) and {key: found.get(key) for key in same} == same else None


def write_marker(settings: Settings, name: str, outcome: Outcome, seconds: float) -> None:
    """Write a step's marker."""
    path = marker_path(settings, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"step": name, "status": outcome.status, "reason": outcome.reason}
    data |= {"command": outcome.commands, "seconds": round(seconds, 1)}
    data["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    data |= machine.identity(settings.dry, settings.small)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def run_steps(steps: list[Step], settings: Settings, say: Callable[[str], None] = print) -> dict[str, Outcome]:
    """Run the steps in order and return what came of each; one that fails or is cut does not stop the others."""
    outcomes: dict[str, Outcome] = {}
    for step in steps:
        before = read_marker(settings, step.name)
        if before and before["status"] in FINISHED and not step.always and not settings.force:
            outcomes[step.name] = Outcome(before["status"], before["reason"], before["command"])
            say(f"{before['status']:>12}  {step.name}: done before, {before['seconds']} s")
            continue
        while True:
            if settings.left < LEAST_SECONDS:
                outcome = Outcome(PARTIAL, "no time left: run the same command again")
                break
            started = time.monotonic()
            runner = Runner(settings, step.name)
            write_marker(settings, step.name, Outcome(PARTIAL, "began and did not end"), 0)
            try:
                outcome = step.run(runner)
            except (OSError, RuntimeError, ValueError, KeyError, AssertionError, subprocess.SubprocessError) as error:
                outcome = Outcome(FAIL, f"{type(error).__name__}: {error}")
            outcome.commands = runner.commands
            write_marker(settings, step.name, outcome, time.monotonic() - started)
            if outcome.status != PARTIAL or outcome.reason.startswith("cut"):
                break
        outcomes[step.name] = outcome
        say(f"{outcome.status:>12}  {step.name}: {outcome.reason}")
    return outcomes


def exit_code(outcomes: dict[str, Outcome]) -> int:
    """Return 1 where a step failed, 2 where one is not measured or not finished, else 0."""
    statuses = {outcome.status for outcome in outcomes.values()}
    return 1 if FAIL in statuses else 2 if statuses & {NOT_MEASURED, PARTIAL} else 0


def pack(out: Path, target: Path) -> None:
    """Put the folder of results into one file: some ways of bringing results home take only a few."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(p for p in out.rglob("*") if p.is_file() and p.resolve() not in (target, part)):
            archive.add(path, path.relative_to(out))
    part.replace(target)


def unpack(target: Path, out: Path) -> None:
    """Bring back what `pack` has put away, where the folder itself is gone."""
    if not target.is_file() or (out / "steps").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(out, filter="data")
        else:
            archive.extractall(out)

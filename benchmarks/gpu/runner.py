"""How a step of the GPU validation run is run: its commands with a log and a limit of time, its marker, its outcome.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu import machine

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "NOT MEASURED"
DRY = "DRY"  # the dry form of a step did what it can: no evidence of a GPU
PARTIAL = "PARTIAL"  # there is more to do; the next run goes on
FINISHED = (PASS, DRY)
MORE = 3  # exit status of a step that has done a part and wants to be called again
TELLS = "outcome: "  # the last line of a step's output, after which the driver finds one sentence
STEP_SECONDS = 570  # every command stays under ten minutes


@dataclass
class Outcome:
    """What came of a step."""

    status: str
    reason: str = ""


@dataclass
class Settings:
    """How the run is done, and where its steps leave their markers."""

    out: Path
    env: Path
    dry: bool = False
    small: bool = False
    force: bool = False
    wheels: Path | None = None
    peers: str = ""
    ends: float = float("inf")  # monotonic time after which nothing new is started

    @property
    def left(self) -> float:
        """Seconds until nothing new is started."""
        return self.ends - time.monotonic()

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return machine.python_of(self.env)

    def marker(self, name: str) -> Path:
        """Return where a step's marker stands."""
        return self.out / "steps" / f"{name}.json"

    def read_marker(self, name: str) -> dict[str, Any] | None:
        """Return a step's marker where it is of this commit, these sources, this GPU and these settings, else None."""
        try:
            found = json.loads(self.marker(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = machine.identity(self.dry, self.small)
        return found if isinstance(found, dict) and {key: found.get(key) for key in same} == same else None

    def write_marker(self, name: str, outcome: Outcome, runner: Runner) -> None:
        """Write a step's marker."""
        path = self.marker(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = {"step": name, "status": outcome.status, "reason": outcome.reason}
        data |= {"command": runner.commands, "seconds": round(time.monotonic() - runner.started, 1)}
        data["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        data |= machine.identity(self.dry, self.small)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


class Runner:
    """Runs the commands of one step, with a log that grows as they speak and a limit of time."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings, self.name, self.commands = settings, name, list[str]()
        self.log = settings.out / "logs" / f"{name}.log"
        self.started = time.monotonic()
        self.deadline = self.started + min(STEP_SECONDS, settings.left)
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
        kept |= {"PYTHONUNBUFFERED": "1", "NSA_SEL_RUN_LOGS": str(self.settings.out)} | (variables or {})
        with self.log.open("ab") as log:
            log.write(f"$ {text}\n".encode())
            log.flush()
            start = log.tell()
            try:
                child = subprocess.Popen(
                    arguments, cwd=machine.ROOT, env=kept, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                return 127, str(error)
            try:
                code = child.wait(timeout=max(1.0, self.left))
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        with self.log.open("rb") as log:
            log.seek(start)
            return code, log.read().decode(errors="replace")

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


def arguments(text: str | None, *more: str) -> argparse.Namespace:
    """Return the options of a step that is a module: --out, --dry, --small, and the positional ones called `more`."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="no GPU")
    parser.add_argument("--small", action="store_true", help="few and small shapes")
    parser.add_argument("--seconds", type=float, default=STEP_SECONDS, help="time left to this step")
    parser.add_argument("--identity", default="", help="what a run must be of to be gone on with")
    parser.add_argument("--peers", default="", help="peers to measure, with commas")
    for name in more:
        parser.add_argument(name)
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def finish(failed: bool, dry: bool, sentence: str) -> NoReturn:
    """Print what came of a step and exit: 0 for PASS, 1 for FAIL, 2 for NOT MEASURED, which a dry form is at best."""
    print(f"{TELLS}{sentence}{'; NOT MEASURED on a GPU' if dry else ''}", flush=True)
    sys.exit(1 if failed else 2 if dry else 0)

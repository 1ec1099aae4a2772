"""The round on a GPU: `make gpu OUT=dir`, or `python -m benchmarks.gpu --out dir`. Standard library only.

Exit status: 0 where every step passed (dry form: did what it can), 1 where one failed, 2 where one is not measured or
not finished. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from benchmarks.gpu import machine, steps
from benchmarks.gpu.common import ROOT
from benchmarks.gpu.round import Settings, exit_code, pack, run_steps, unpack


def parse(arguments: list[str] | None = None) -> tuple[Settings, str, Path | None]:
    """Return settings, the names of the steps, and the file to pack into."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--env", type=Path, default=ROOT / "build" / "gpu" / "env", help="environment to build into")
    parser.add_argument("--dry", action="store_true", help="no GPU: the host run stands in, times stay empty")
    parser.add_argument("--small", action="store_true", help="few and small shapes")
    parser.add_argument("--force", action="store_true", help="run finished steps again, bench from its beginning")
    parser.add_argument("--steps", default="", help=f"some of {', '.join(step.name for step in steps.STEPS)}")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what this machine lacks")
    parser.add_argument("--seconds", type=float, help="end after so many seconds; the same command goes on from there")
    parser.add_argument("--pack", default="", help="put the results into one file: 1 for OUT.tar.gz, or its path")
    given = parser.parse_args(arguments)
    out = given.out.absolute()
    ends = time.monotonic() + given.seconds if given.seconds else float("inf")
    wheels = given.wheels.absolute() if given.wheels else None
    settings = Settings(out, given.env.absolute(), given.dry, given.small, given.force, wheels, ends)
    target = out.with_name(f"{out.name}.tar.gz") if given.pack == "1" else Path(given.pack).absolute()
    return settings, given.steps, target if given.pack else None


def main(arguments: list[str] | None = None) -> int:
    """Run the round and return its exit status."""
    settings, names, target = parse(arguments)
    try:
        chosen = steps.chosen(names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if target is not None:
        unpack(target, settings.out)
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.force:
        (settings.out / "steps" / "bench-began.json").unlink(missing_ok=True)
    if not steps.built(settings.env):  # another machine, or other sources: what was built is not here
        (settings.out / "steps" / "build.json").unlink(missing_ok=True)
    print(f"{machine.commit()} (sources {machine.digest()}) into {settings.out}", flush=True)
    outcomes = run_steps(chosen, settings, lambda line: print(line, flush=True))
    shutil.rmtree(settings.out / "part", ignore_errors=True)
    if target is not None:
        pack(settings.out, target)
        print(f"packed into {target}")
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())

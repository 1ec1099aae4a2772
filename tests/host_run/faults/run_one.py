"""Runs planted faults in a process of its own: a sanitizer's runtime has to be there first, and ends the process."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.host_run.faults.launcher import FaultRunner

if __name__ == "__main__":
    library, variant, *names = sys.argv[1:]
    runner = FaultRunner(library)
    for name in names:
        print(name, runner.run(name, variant == "faulty", schedule=0), flush=True)

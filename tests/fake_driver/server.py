"""Runs cases, each in a fork of a process that has imported torch and nsa_sel and has not asked for a driver yet.

python -m tests.fake_driver.server      a case's name a line on stdin; a line of JSON for each on stdout
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

import nsa_sel
from tests.fake_driver import cases


def run(name: str) -> dict[str, str]:
    """Run one case in a child; what it printed or raised comes back as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        text = ""
        try:
            getattr(cases, name)()
        except BaseException:
            text = traceback.format_exc()
        os.write(write, text.encode()[-60_000:])
        os._exit(1 if text else 0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"case": name, "failure": text or (f"ended with {status}" if status else "")}


def main() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    assert nsa_sel.build_info()["kernels"]
    for line in sys.stdin:
        print(json.dumps(run(line.strip())), flush=True)


if __name__ == "__main__":
    main()

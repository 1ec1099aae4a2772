"""The process of one peer: `python -m nsa_sel.measure.run.worker NAME FOLDER SETTINGS`, one JSON line a case.

It reads `{"workload", "mode"}` and answers with the peer's times and those of sdpa beside it. It makes the inputs
again: shape and seed alone decide them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_sel.measure.run.contestants import own
from nsa_sel.measure.run.environment import tf32_off
from nsa_sel.measure.run.peers import load
from nsa_sel.measure.run.race import ContextLostError, Settings, race, set_up
from nsa_sel.measure.run.workload import Workload


def main() -> None:
    """Answer until the parent closes the pipe; a broken CUDA context ends the process after its answer."""
    name, folder, how = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tf32_off()
    settings = Settings(**how | {"device": torch.device(how["device"]), "modes": tuple(how["modes"])})
    adapter = load(name, folder)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        workload = Workload(**asked["workload"])
        lost = False
        variants, oracle = set_up(workload, settings)
        try:
            case = race([own("sdpa"), adapter], variants, asked["mode"], settings, oracle)
        except ContextLostError as error:
            case, lost = error.args[1], True
        answers.write(json.dumps([asdict(case.timed[adapter.name]), asdict(case.timed["sdpa"])]) + "\n")
        answers.flush()
        if lost:
            os._exit(1)  # destructors would meet the broken context again
        del variants
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

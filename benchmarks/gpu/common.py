"""What the steps of the round share: their options, and how each tells what came of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "NOT MEASURED"
ROOT = Path(__file__).resolve().parents[2]
MORE = 3  # exit status of a step that has done a part and wants to be called again
TELLS = "outcome: "  # the last line of a step's output, after which the driver finds one sentence


def arguments(text: str | None, *more: str) -> argparse.Namespace:
    """Return the options of a step: --out, --dry, --small, and the positional arguments called `more`."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="no GPU: the host run stands in for the kernel")
    parser.add_argument("--small", action="store_true", help="few and small shapes")
    for name in more:
        parser.add_argument(name)
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def has_gpu() -> bool:
    """Return whether torch sees a GPU here."""
    import torch

    return torch.cuda.is_available()


def finish(failed: bool, dry: bool, sentence: str) -> NoReturn:
    """Print what came of a step and exit: 0 for PASS, 1 for FAIL, 2 for NOT MEASURED, which a dry form is at best."""
    print(f"{TELLS}{sentence}{'; NOT MEASURED on a GPU' if dry else ''}", flush=True)
    sys.exit(1 if failed else 2 if dry else 0)

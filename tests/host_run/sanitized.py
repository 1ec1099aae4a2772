"""Runs cases of the kernel's AddressSanitizer and UBSan build, whose runtime has to be preloaded: in its own process.

LD_PRELOAD=... python -m tests.host_run.sanitized ROOT CASE...   prints `CASE clean` or what was found
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nsa_sel.testing import assert_matches_reference, make_inputs
from tests.host_run.abi import Device
from tests.host_run.kernel import Options, selection_attention

A100 = Device()
H200 = Device(sm_count=4, capability=90, smem_per_block=232_448, smem_per_sm=233_472)
HUGE = 2**62  # times a block size it does not fit 64 bits


def _spans(B: int, *lengths: int) -> torch.Tensor:
    start = torch.arange(B).mul(7).view(B, 1, 1, 1) + torch.tensor(lengths).cumsum(0) - lengths[0]
    return torch.stack([start, start + torch.tensor(lengths)], -1)


def _blocks() -> torch.Tensor:
    return torch.tensor([[0, 3, HUGE, -1, 2], [5, -HUGE, 2**63 - 1, 1, 4]]).view(2, 1, 1, 5)


def _hostile() -> torch.Tensor:
    ends = torch.tensor([[-(2**63), 2**63 - 1], [2**62, -5], [3, 20], [40, 2**31], [-1, 9]])
    return ends.view(1, 1, 1, 5, 2)


# Inputs, then what selection_attention is asked beside them. Dims 64/64 are those of the changed copies as well.
CASES: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]] = {
    "blocks": lambda: (
        dict(block_indices=_blocks(), block_size=64, h=9, Dk=64, Dv=64, S_kv=400, page_size=16),
        dict(num_splits=1),
    ),
    "hostile-ranges": lambda: (
        dict(ranges=_hostile(), h=3, Dk=64, Dv=64, S_kv=120, seq_lens=[100]),
        dict(num_splits=1),
    ),
    "combine": lambda: (dict(ranges=_spans(2, 70, 90, 3), h=16, Dk=192, Dv=128, S_kv=300), dict(num_splits=3)),
    "many-heads": lambda: (dict(ranges=_spans(2, 40, 33), h=64, Dk=128, Dv=64, S_kv=200), dict(num_splits=1)),
    "cluster": lambda: (
        dict(ranges=_spans(1, 80, 90), h=20, Dk=64, Dv=128, S_kv=200),
        dict(num_splits=4, options=Options(device=H200)),
    ),
    "bulk": lambda: (
        dict(ranges=_spans(3, 100, 130), h=9, Dk=128, Dv=128, S_kv=320, page_size=16),
        dict(num_splits=1, options=Options(device=H200, loads="bulk")),
    ),
}


def run(name: str, root: Path, schedule: int) -> list[str]:
    """Run a case and compare it with the oracle; return what the emulator found."""
    made, asked = CASES[name]()
    inputs = make_inputs(dtype=torch.bfloat16, **made)
    options = replace(asked.pop("options", Options(device=A100)), kind="asan", root=root)
    result = selection_attention(**inputs.arguments(return_lse=True), schedule=schedule, options=options, **asked)
    if not result.findings:
        assert_matches_reference(result.out, result.lse, inputs)
    return result.findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        found = [text for schedule in (0, 1) for text in run(case, Path(sys.argv[1]), schedule)]
        print(case, found or "clean", flush=True)

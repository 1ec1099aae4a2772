"""The measuring instrument on a GPU: every mode runs there, and what ran is proven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa_sel.measure.files import read_rows
from nsa_sel.measure.run.race import Settings
from nsa_sel.measure.run.session import BenchSession, DecodeSession
from nsa_sel.measure.run.workload import load_suite
from tests.backends_under_test import no_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(no_kernels() is not None, reason=f"cuda: {no_kernels()}"),
]
CUDA = torch.device("cuda", 0)


def test_every_mode_runs(tmp_path: Path) -> None:
    names = ["cuda", "sdpa", "sdpa_prepared", "sdpa_gathered"]
    run = BenchSession(Settings(CUDA, (), iters=3, warmup=1), names, None, tmp_path, resume=False)
    list(run.run(load_suite("ci"), None, every=60))
    found = {(row["backend"], row["mode"]) for row in read_rows(tmp_path / "bench.csv") if row["ran"] == row["backend"]}
    assert found == {(name, mode) for name in names for mode in ("eager", "graph", "streams2")}
    assert run.results.parity_failures == []
    assert run.results.clocks


def test_decode_step_runs_in_a_graph(tmp_path: Path) -> None:
    run = DecodeSession(Settings(CUDA, ("graph",), iters=3, warmup=1), [2048], [1], "cuda")
    list(run.run(tmp_path))
    assert {row["ran"] for row in read_rows(tmp_path / "decode.csv")} >= {"torch", "cuda"}

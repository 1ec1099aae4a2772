"""The sweep over Triton's settings, on a stand-in whose speed depends on the settings as a kernel's does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_sel.measure.run import session, tune
from nsa_sel.measure.run.contestants import Own
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.race import Settings
from nsa_sel.measure.run.session import TuneSession
from nsa_sel.measure.run.tune import Config, best_by_bucket, bucket_of, grid, sweep
from nsa_sel.measure.run.workload import from_options

CONFIGS = [Config(64, 32, 4, 1), Config(128, 32, 4, 2), Config(256, 32, 4, 3)]


class StandIn(Own):
    """Packed SDPA that waits longer for some settings; it runs as "sdpa", so that the package's own counts prove it."""

    def __init__(self) -> None:
        super().__init__("sdpa")
        self.config: Config | None = None

    @contextlib.contextmanager
    def using(self, config: Config) -> Iterator[None]:
        self.config = config
        yield
        self.config = None

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        run, best = super().prepare(inputs), 128 if inputs.workload.L == 64 else 256

        def call() -> torch.Tensor:
            assert self.config is not None
            time.sleep(0.0 if self.config.block_tokens == best else 0.004)
            if self.config.block_tokens == 64:
                return run() + 1
            return run()

        return call


def _sweep() -> list[dict[str, Any]]:
    workloads = from_options({"rows": [4], "h": [2], "Dk": [64], "L": [64, 256], "dist": ["few"], "G": 2, "S_kv": 512})
    rows: list[dict[str, Any]] = []
    stand_in = StandIn()
    settings = Settings(torch.device("cpu"), ("eager",), iters=3, warmup=1)
    assert list(sweep(workloads, stand_in, settings, rows, stand_in, CONFIGS)) == [w.name for w in workloads]
    return rows


def test_best_configuration_of_each_bucket() -> None:
    rows = _sweep()
    assert len(rows) == 6
    assert all(tuple(row) == tune.COLUMNS for row in rows)
    best = best_by_bucket(rows, "sdpa")
    assert {bucket: chosen["block_tokens"] for bucket, chosen in best.items()} == {"64": 128, "256": 256}


def test_a_configuration_with_wrong_results_is_no_candidate() -> None:
    wrong = [row for row in _sweep() if row["block_tokens"] == 64]
    assert {row["ran"] for row in wrong} == {""}
    assert all(float(row["mae"]) > 0.5 for row in wrong)


def test_a_configuration_must_have_run_on_every_workload_of_its_bucket() -> None:
    rows = [
        {"bucket": 64, "workload": w, "ran": ran, "ms_median": ms, "block_tokens": b, "block_dims": 32}
        | {"num_warps": 4, "num_stages": 1}
        for w, b, ran, ms in (
            ("a", 64, "triton", 1.0),
            ("b", 64, "", ""),
            ("a", 128, "triton", 2.0),
            ("b", 128, "triton", 3.0),
            ("a", 256, "triton", 2.5),
            ("b", 256, "triton", 2.9),
        )
    ]
    best = best_by_bucket(rows, "triton")
    assert best["64"]["block_tokens"] == 128  # worst slowdown 3.0 / 2.9, against 2.5 / 2.0
    assert best_by_bucket(rows[1:2], "triton") == {}


def test_grid_and_buckets() -> None:
    assert len(set(grid())) == 81
    assert {bucket_of(length) for length in (16, 31, 32, 33, 4096)} == {16, 32, 64, 4096}


def test_files_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    # Only where the sweep looks: routing must go on finding the backends there are.
    monkeypatch.setattr(session, "backends", SimpleNamespace(get=lambda name: stand_in))
    monkeypatch.setattr(tune, "grid", lambda: CONFIGS[1:])
    monkeypatch.setattr(tune, "Own", lambda name, interpreted: stand_in)
    workloads = from_options({"rows": [4], "h": [2], "Dk": [64], "L": [64], "dist": ["few"], "G": 2, "S_kv": 512})
    list(TuneSession(torch.device("cpu"), None, 0, 2, 0).run(workloads, tmp_path))
    lines = (tmp_path / "tune_triton.csv").read_text().splitlines()
    assert lines[0] == ",".join(tune.COLUMNS)
    assert len(lines) == 3
    assert '"best"' in (tmp_path / "tune_triton.json").read_text()

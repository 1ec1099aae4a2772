"""The sweep over Triton's settings, on a stand-in whose speed depends on the settings as a kernel's does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_sel.measure.files import read_json, read_rows
from nsa_sel.measure.run import tune
from nsa_sel.measure.run.contestants import Contestant, own
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.race import Settings
from nsa_sel.measure.run.tune import SETTINGS, Config, best_by_bucket, bucket_of, grid, run_tune
from nsa_sel.measure.run.workload import from_options


class StandIn:
    """Packed SDPA by a clock of its own; it runs as "sdpa", so that the package's own counts prove it."""

    config: Config | None = None
    now = 0.0

    @contextlib.contextmanager
    def using(self, config: Config) -> Iterator[None]:
        self.config = config
        yield
        self.config = None

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        run, best = own("sdpa").prepare(inputs), 128 if inputs.workload.L == 64 else 256

        def call() -> torch.Tensor:
            assert self.config is not None
            self.now += 0.001 if self.config.block_tokens == best else 0.004
            out: torch.Tensor = run()
            return out + 1 if self.config.block_tokens == 64 else out  # which computes something else

        return call


def test_files_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(time, "perf_counter", lambda: stand_in.now)
    monkeypatch.setattr(tune, "grid", lambda: [Config(64, 32, 4, 1), Config(128, 32, 4, 2), Config(256, 32, 4, 3)])
    monkeypatch.setattr(tune, "own", lambda name, interpreted: Contestant("sdpa", stand_in.prepare))
    monkeypatch.setattr(tune, "best_by_bucket", lambda rows, name: best_by_bucket(rows, "sdpa"))
    workloads = from_options({"rows": [4], "h": [2], "Dk": [64], "L": [64, 256], "dist": ["few"], "G": 2, "S_kv": 512})
    settings = Settings(torch.device("cpu"), ("eager",), iters=3, warmup=1)
    assert list(run_tune(workloads, stand_in, settings, tmp_path)) == [workload.name for workload in workloads]
    rows, data = read_rows(tmp_path / tune.FILE), read_json(tmp_path / "tune_triton.json")
    assert [tuple(row) for row in rows] == [tune.COLUMNS] * 6
    assert {bucket: one["block_tokens"] for bucket, one in data["best"].items()} == {"64": 128, "256": 256}
    wrong = [row for row in rows if row["block_tokens"] == "64"]
    assert {row["ran"] for row in wrong} == {""}
    assert all(float(row["mae"]) > 0.5 for row in wrong)


def test_a_configuration_must_have_run_on_every_workload_of_its_bucket() -> None:
    tried: list[tuple[Any, ...]] = [
        ("a", 64, "triton", 1.0), ("b", 64, "", ""), ("a", 128, "triton", 2.0), ("b", 128, "triton", 3.0),
        ("a", 256, "triton", 2.5), ("b", 256, "triton", 2.9),
    ]  # fmt: skip
    same = {"bucket": 64} | dict.fromkeys(SETTINGS, 1)
    rows = [same | {"workload": w, "block_tokens": b, "ran": ran, "ms_median": ms} for w, b, ran, ms in tried]
    # Worst slowdown 3.0 / 2.9, against 2.5 / 2.0
    assert best_by_bucket(rows, "triton")["64"] == dict.fromkeys(SETTINGS, 1) | {
        "block_tokens": 128, "worst_slowdown": 1.0345, "workloads": 2,
    }  # fmt: skip
    assert best_by_bucket(rows[1:2], "triton") == {}


def test_grid_and_buckets() -> None:
    assert len(set(grid())) == 81
    assert {bucket_of(length) for length in (16, 31, 32, 33, 4096)} == {16, 32, 64, 4096}

"""The pytest-benchmark suites run, store what they measured, and compare with what was stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_suites_run_store_and_compare(tmp_path: Path) -> None:
    def run(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "ci-few-L32 or 1024", "-q", *options]
        command += [f"--benchmark-storage={tmp_path}", "-p", "no:cacheprovider", "-p", "no:xdist", "--device", "cpu"]
        # Inside a worker of pytest-xdist these variables would make the benchmarks think that they are one, and store
        # nothing.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = inherited | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run("--benchmark-autosave")
    assert "4 passed" in first  # packed SDPA, the two plain ways over gathered K and V, and the decode step
    assert "cuda is not measured" in first
    (stored,) = tmp_path.rglob("*.json")
    data = json.loads(stored.read_text())
    found = {one["name"]: one["extra_info"] for one in data["benchmarks"]}
    assert found["test_selection[ci-few-L32-sdpa]"]["ran"] == "sdpa"
    assert 0 < found["test_selection[ci-few-L32-sdpa]"]["mae"] < 1e-3
    assert data["machine_info"]["nsa_sel"]["tf32"] is False
    assert "(NOW)" in run("--benchmark-compare")

"""The commands that judge data: exit codes, what they print, and that they write only what they are told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_sel import policy
from tests.measure.commands import run
from tests.planted import DEVICE, bench, cell, decode, write


def test_gate_exit_codes_json_and_nothing_written(tmp_path: Path) -> None:
    def gate(name: str, code: int, *frames: Any) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        paths = write(folder, *frames)
        result = run("gate", "--bench", paths[0], "--decode", paths[1], "--json", code=code)
        assert sorted(path.name for path in folder.iterdir()) == ["bench.csv", "decode.csv"]
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    assert gate("pass", 0)["min_l"] == 64
    assert gate("fail", 1, None, decode({1: (0.1,) * 3}))["gates"]["share"]["verdict"] == "FAIL"
    assert gate("unmeasured", 2, cell(bench(), "mae", float("nan"), backend="cuda"))["verdict"] == "NOT MEASURED"
    run("gate", "--bench", tmp_path / "none.csv", "--decode", tmp_path / "none.csv", code=2)
    run("gate", code=2)


def test_gate_prints_a_table_and_writes_what_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_path, decode_path = write(tmp_path)
    default = tmp_path / "user" / "policy.json"
    monkeypatch.setenv("NSA_SEL_POLICY", str(default))
    out = tmp_path / "record"
    files = ["--bench", bench_path, "--decode", decode_path]
    result = run("gate", *files, "--out", out, "--write-policy", "default")
    assert "PASS, min_l = 64" in result.output
    assert "DECISION" not in result.output
    (record,) = out.iterdir()
    assert "**PASS.**" in record.read_text()
    assert policy.load(default).rule(DEVICE, "cuda") == policy.Rule(True, 64)


def test_gate_takes_other_rules_and_refuses_wrong_ones(tmp_path: Path) -> None:
    paths = write(tmp_path)
    files = ["--bench", paths[0], "--decode", paths[1]]
    rules = tmp_path / "rules.toml"
    rules.write_text("[share]\nmin = 0.9\n")
    run("gate", *files, "--rules", rules, code=1)
    rules.write_text("[share]\nminimum = 0.1\n")
    assert "got share.minimum" in run("gate", *files, "--rules", rules, code=2).output
    assert "backend: expected cuda or triton" in run("gate", *files, "--backend", "sdpa", code=2).output


def test_threshold_command(tmp_path: Path) -> None:
    path, _ = write(tmp_path, bench({64: 1.1, 256: 1.4, 1024: 2.0}))
    assert run("threshold", path).output.startswith("# Threshold of `cuda`: 256")
    assert json.loads(run("threshold", path, "--margin", 1.5, "--json").stdout)["min_l"] == 1024
    assert json.loads(run("threshold", path, "--margin", 3, "--json", code=1).stdout)["min_l"] is None
    run("threshold", path, "--max-mae", "1e-5", code=1)
    run("threshold", path, "--backend", "triton", code=2)
    assert "expected a finite number" in run("threshold", path, "--margin", "nan", code=2).output
    run("threshold", path, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "threshold.md").read_text().startswith("# Threshold of `cuda`: 256")

"""The measuring commands on a CPU: everything runs, says what it could not measure, and writes what it promises."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import nsa_sel
from nsa_sel.cli import app
from nsa_sel.measure import schema
from tests.data.planted import DEVICE, bench, cell, decode, write

QUICK = ["--iters", "3", "--warmup", "1", "--device", "cpu"]


def run(*arguments: object, code: int | None = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code is None or result.exit_code == code, result.output
    return result


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    run("bench", "--suite", "ci", "--out", folder, *QUICK)
    run("decode", "--context", "1024,2k", "--B", "1", "--out", folder, *QUICK)
    return folder


def test_bench_writes_its_columns_and_says_what_ran(measured: Path) -> None:
    assert (measured / "bench.csv").read_text().splitlines()[0] == (
        "workload,dist,dtype,B,S,G,h,Dk,Dv,S_kv,n,L,rows,backend,ran,mode,iters,ms_median,ms_p20,ms_p80,bytes,gbps,"
        "ceiling_gbps,ceiling_share,speedup,mae,max_err,device,sm,commit"
    )
    rows = table(measured / "bench.csv")
    assert {row["dist"] for row in rows} == {"few", "many", "mixed", "blocks"}
    ran = {
        backend: {row["ran"] for row in rows if row["backend"] == backend} for backend in {r["backend"] for r in rows}
    }
    assert ran["sdpa"] == {"sdpa"}
    assert ran["sdpa_gathered"] == {"sdpa_gathered"}
    assert ran["cuda"] == {""}
    for row in rows:
        if row["ran"]:
            assert 0 < float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"])
            assert float(row["mae"]) <= float(row["max_err"])
            assert float(row["mae"]) <= 1e-3
            assert int(row["iters"]) == 3
        else:
            assert row["ms_median"] == row["speedup"] == row["mae"] == ""  # nothing ran, so nothing is compared


def test_bench_figures_follow_from_each_other(measured: Path) -> None:
    rows = table(measured / "bench.csv")
    times = {row["workload"]: float(row["ms_median"]) for row in rows if row["backend"] == "sdpa"}
    for row in rows:
        if not row["ran"]:
            continue
        shape = {letter: int(row[letter]) for letter in schema.BENCH_SHAPE}
        slot = 1 if row["dist"] == "blocks" else 2
        dims = (shape["Dk"], shape["Dv"])
        assert int(row["bytes"]) == schema.call_bytes(
            shape["rows"], shape["h"], dims, shape["n"], shape["L"], 2, per_slot=slot
        )
        ms = float(row["ms_median"])
        assert float(row["speedup"]) == pytest.approx(times[row["workload"]] / ms, rel=1e-5)
        assert float(row["gbps"]) == pytest.approx(int(row["bytes"]) / ms / 1e6, rel=1e-5)
        share = float(row["gbps"]) / float(row["ceiling_gbps"])
        assert float(row["ceiling_share"]) == pytest.approx(share, rel=1e-5)


def test_bench_environment(measured: Path) -> None:
    data = json.loads((measured / "bench.json").read_text())
    environment = data["environment"]
    assert {"device", "sm", "commit", "command", "torch", "nsa_sel", "seed", "iters", "warmup", "time"} <= set(
        environment
    )
    assert environment["tf32"] is False
    assert environment["sm"] == "cpu"
    first = data["intervals"][0]
    assert first["ms_median_ci95"][0] <= first["ms_median_ci95"][1]
    assert {(one["backend"], one["mode"]) for one in data["not_measured"]} >= {("cuda", "eager")}
    assert all("cpu" in one["reason"] for one in data["not_measured"] if one["backend"] == "cuda")


def test_shape_on_the_command_line(tmp_path: Path) -> None:
    shape = ["--rows", 4, "--h", 3, "--D", 64, "--Dv", 128, "--L", "16,64", "--dist", "few", "--dtype", "fp32"]
    run("bench", *shape, "--S-kv", 128, "--mode", "eager", "--backend", "sdpa", "--out", tmp_path, *QUICK)
    rows = table(tmp_path / "bench.csv")
    assert [(r["L"], r["h"], r["Dk"], r["Dv"], r["rows"], r["dtype"], r["ran"]) for r in rows] == [
        ("16", "3", "64", "128", "4", "fp32", "sdpa"),
        ("64", "3", "64", "128", "4", "fp32", "sdpa"),
    ]
    assert float(rows[0]["mae"]) < 1e-6
    assert {row["speedup"] for row in rows} == {"1"}


def test_modes_of_a_gpu_are_not_measured_on_a_cpu(tmp_path: Path) -> None:
    result = run("bench", "--limit", 1, "--mode", "eager,graph,streams2", "--out", tmp_path, *QUICK)
    rows = [row for row in table(tmp_path / "bench.csv") if row["backend"] == "sdpa"]
    assert [(row["mode"], row["ran"]) for row in rows] == [("eager", "sdpa"), ("graph", ""), ("streams2", "")]
    assert "mode graph needs a CUDA device" in result.output


def test_parity_failure_ends_with_1_and_a_command_that_shows_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_sel.backends import sdpa

    right = sdpa.run

    def wrong(call: Any, **options: Any) -> Any:
        out, lse = right(call, **options)
        return out + 0.01, lse

    shape = ["--rows", 4, "--h", 2, "--D", 64, "--L", 64, "--dist", "many", "--S-kv", 256, "--backend", "sdpa"]
    monkeypatch.setattr(sdpa, "run", wrong)
    result = run("bench", *shape, "--seed", 7, "--out", tmp_path / "a", *QUICK, code=1)
    found = re.search(r"PARITY FAILURE sdpa .*MAE ([\d.]+).*Reproduce: nsa-sel (bench .*)", result.output)
    assert found is not None
    assert float(found[1]) == pytest.approx(0.01, rel=0.1)
    again = run(*found[2].split(), "--iters", 1, "--warmup", 0, "--out", tmp_path / "b", code=1)
    first, second = (table(tmp_path / name / "bench.csv")[0] for name in "ab")
    assert [first[c] for c in ("mae", "max_err", "L", "dist")] == [second[c] for c in ("mae", "max_err", "L", "dist")]
    assert "--seed 7" in again.output
    monkeypatch.setattr(sdpa, "run", right)
    run(*found[2].split(), "--iters", 1, "--warmup", 0, "--out", tmp_path / "c")


def test_resume_goes_on_and_never_mixes_runs(tmp_path: Path) -> None:
    run("bench", "--limit", 2, "--out", tmp_path, *QUICK)
    first = table(tmp_path / "bench.csv")
    run("bench", "--limit", 3, "--resume", "--out", tmp_path, *QUICK)
    both = table(tmp_path / "bench.csv")
    assert both[: len(first)] == first
    assert len({row["workload"] for row in both}) == 3
    other = ["--iters", "4", "--warmup", "1", "--device", "cpu"]
    assert "expected iters = 4" in run("bench", "--resume", "--out", tmp_path, *other, code=2).output
    (tmp_path / "bench.csv").write_text((tmp_path / "bench.csv").read_text().replace("CPU ", "GPU "))
    assert "resume: expected device" in run("bench", "--resume", "--out", tmp_path, *QUICK, code=2).output


def test_no_workload_is_started_when_time_is_up(tmp_path: Path) -> None:
    result = run("bench", "--seconds", "0.000001", "--out", tmp_path, *QUICK)
    assert len({row["workload"] for row in table(tmp_path / "bench.csv")}) <= 1
    assert "not started within" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "plan", "--L", "16"], "got both"),
        (["--suite", "plans"], "expected plan, decode, models, ci"),
        (["--L", "wide"], "L: expected whole numbers"),
        (["--mode", "warm"], "expected one of eager"),
        (["--backend", "cutlass"], "backend: expected"),
        (["--device", "tpu"], "device: expected"),
        (["--device", "cuda:99"], "device: expected"),
        (["--peers", "/nonexistent"], "peers: expected a folder"),
    ],
)
def test_bad_options_end_with_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in run("bench", *arguments, "--out", tmp_path, code=2).output
    assert not list(tmp_path.iterdir())


def test_decode_writes_its_columns_and_stages(measured: Path) -> None:
    lines = (measured / "decode.csv").read_text().splitlines()
    assert lines[0] == "B,context,stage,ms_median,ms_p20,ms_p80,share,backend,ran,device,sm,commit"
    rows = table(measured / "decode.csv")
    assert [(row["context"], row["stage"]) for row in rows] == [(c, s) for c in ("1024", "2048") for s in schema.STAGES]
    assert {row["ran"] for row in rows if row["stage"] == "select"} == {"sdpa"}
    assert all(0 < float(row["share"]) < 1 for row in rows)
    steps = json.loads((measured / "decode.json").read_text())["steps"]
    assert [step["sparse"] for step in steps] == [False, True]


def test_decode_says_where_nothing_is_sparse(tmp_path: Path) -> None:
    result = run("decode", "--context", "128,2048", "--B", 1, "--out", tmp_path, *QUICK)
    assert "nothing is sparse yet at context 128:" in result.output
    assert "projections and the MLP are no part" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "16"], "a context of at least"),
        (["--backend", "flash"], "backend: expected"),
        (["--leave-out", "mlp"], "leave_out: expected stages"),
        (["--mode", "graph"], "graph on a CUDA device"),
        (["--context", "4k,x"], "context: expected whole numbers"),
    ],
)
def test_bad_decode_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in run("decode", *arguments, "--out", tmp_path, *QUICK, code=2).output.replace("\n", " ")


def test_what_a_cpu_measured_is_not_measured_for_the_gate(measured: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    files = ["--bench", measured / "bench.csv", "--decode", measured / "decode.csv"]
    result = run("gate", *files, "--json", "--write-policy", policy, code=2)
    data = json.loads(result.stdout)
    assert data["verdict"] == "NOT MEASURED"
    assert data["min_l"] is None
    assert {gate["verdict"] for gate in data["gates"].values()} == {"NOT MEASURED"}
    assert not policy.exists()
    assert run("threshold", measured / "bench.csv", code=2).output.startswith("# Threshold of `cuda`: NOT MEASURED")


def test_report_of_what_a_cpu_measured(measured: Path) -> None:
    run("report", measured)
    page = (measured / "report.md").read_text()
    assert "**NOT MEASURED**" in page
    assert {path.stem for path in measured.glob("*.png")} == {"speedup", "bandwidth", "share", "roofline"}


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
    assert nsa_sel.policy.load(default).rule(DEVICE, "cuda") == nsa_sel.policy.Rule(True, 64)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_every_mode_runs_on_a_gpu(tmp_path: Path) -> None:
    run("bench", "--suite", "ci", "--iters", 3, "--warmup", 1, "--out", tmp_path)
    rows = [row for row in table(tmp_path / "bench.csv") if row["backend"] == "sdpa"]
    assert {row["mode"] for row in rows if row["ran"] == "sdpa"} == {"eager", "graph", "streams2"}
    run("decode", "--context", "2k", "--B", 1, "--iters", 3, "--out", tmp_path)
    assert {row["ran"] for row in table(tmp_path / "decode.csv")} <= {"torch", "cuda", "sdpa"}

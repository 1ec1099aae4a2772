"""The measuring commands on a CPU: everything runs, says what it could not measure, and writes what it promises."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nsa_sel.cli.app import app
from nsa_sel.measure import schema
from tests.measure.commands import QUICK, run, table


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
    assert ran["sdpa_prepared"] == {"sdpa_prepared"}
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
    assert [(row["context"], row["stage"]) for row in rows] == [
        (c, s) for c in ("1024", "2048") for s in (*schema.STAGES, schema.STEP)
    ]
    assert {row["ran"] for row in rows if row["stage"] == "select"} == {"sdpa"}
    assert all(0 < float(row["share"]) <= 1 for row in rows)
    assert json.loads((measured / "decode.json").read_text())["finished"] == {"rows": 12}
    steps = json.loads((measured / "decode.json").read_text())["steps"]
    assert [step["sparse"] for step in steps] == [False, True]


def test_decode_says_where_nothing_is_sparse(tmp_path: Path) -> None:
    result = run("decode", "--context", "128,2048", "--B", 1, "--out", tmp_path, *QUICK)
    assert "nothing is sparse yet at context 128:" in result.output
    assert "projections and the MLP are no part" in result.output


def test_decode_keeps_what_it_measured_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_sel.measure.run import session

    def step(batch: int, context: int, *rest: Any) -> Any:
        if context > 1024:
            raise torch.OutOfMemoryError("no memory")
        return right(batch, context, *rest)

    right = session.DecodeStep
    monkeypatch.setattr(session, "DecodeStep", step)
    result = run("decode", "--context", "1024,2048", "--B", 1, "--out", tmp_path, *QUICK)
    assert "no memory for B=1, context=2048" in result.output
    assert {row["context"] for row in table(tmp_path / "decode.csv")} == {"1024"}


def test_a_run_cut_off_inside_a_workload_keeps_whole_workloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_sel.measure.run import bench as bench_module

    calls = 0
    right = bench_module.race

    def cut(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the third workload
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(bench_module, "race", cut)
    CliRunner().invoke(app, ["bench", "--backend", "sdpa,sdpa_gathered,cuda", "--out", str(tmp_path), *QUICK])
    whole = table(tmp_path / "bench.csv")
    assert len(whole) == 6
    assert len({row["workload"] for row in whole}) == 2
    assert json.loads((tmp_path / "bench.json").read_text())["finished"] is None
    monkeypatch.undo()
    run("bench", "--backend", "sdpa,sdpa_gathered,cuda", "--resume", "--out", tmp_path, *QUICK)
    rows = table(tmp_path / "bench.csv")
    assert rows[:6] == whole
    assert len(rows) == 7 * 3
    assert json.loads((tmp_path / "bench.json").read_text())["finished"] == {"rows": 21}


def test_a_finished_run_is_not_written_over(measured: Path) -> None:
    before = (measured / "bench.csv").read_bytes()
    said = run("bench", "--limit", 1, "--out", measured, *QUICK, code=2).output
    assert "expected a folder without a finished run" in said
    assert (measured / "bench.csv").read_bytes() == before


def test_bench_prints_its_table(tmp_path: Path) -> None:
    said = run("bench", "--limit", 1, "--backend", "sdpa,cuda", "--out", tmp_path, *QUICK).output
    assert re.search(r"│ sdpa +│ eager +│ 1 of 1 +│ +[\d.]+ +│ 1 +│", said)
    assert re.search(r"│ cuda +│ eager +│ 0 of 1 .*NOT MEASURED +│", said)


def test_tune_says_what_it_needs_rather_than_write_empty_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "expected a GPU, or Triton's interpreter" in run("bench", "--tune", "--out", tmp_path, *QUICK, code=2).output
    assert not list(tmp_path.iterdir())


BAD_FILES = {
    "no JSON": lambda folder: (folder / "bench.json").write_text("{"),
    "a list": lambda folder: (folder / "bench.json").write_text("[]"),
    "a key of a wrong type": lambda folder: (folder / "bench.json").write_text('{"environment": 3}'),
    "deep JSON": lambda folder: (folder / "bench.json").write_text("[" * 100_000),
    "a long number": lambda folder: (folder / "bench.json").write_text('{"a": ' + "1" * 5000 + "}"),
    "a long cell": lambda folder: (folder / "bench.csv").write_text("workload\n" + "x" * 140_000),
    "a quote that does not end": lambda folder: (folder / "bench.csv").write_text('a,b\n"1,2\n'),
    "no text": lambda folder: (folder / "bench.csv").write_bytes(b"\xff\xfe\x00"),
    "a folder": lambda folder: ((folder / "bench.csv").unlink(), (folder / "bench.csv").mkdir()),
    "a pipe": lambda folder: ((folder / "bench.csv").unlink(), os.mkfifo(folder / "bench.csv")),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_malformed_file_is_one_line_and_exit_2(measured: Path, tmp_path: Path, what: str) -> None:
    for name in ("bench.csv", "bench.json", "decode.csv", "decode.json"):
        shutil.copy(measured / name, tmp_path)
    BAD_FILES[what](tmp_path)
    said = run("bench", "--resume", "--out", tmp_path, *QUICK, code=2).output
    assert len([line for line in said.splitlines() if "error:" in line]) == 1
    assert "Traceback" not in said
    run("gate", "--bench", tmp_path / "bench.csv", "--decode", tmp_path / "decode.csv", code=2)
    run("report", tmp_path, code=0)  # of what can be read


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
    assert {path.stem for path in measured.glob("*.png")} == {"speedup", "bandwidth", "share"}

"""The measuring commands on a CPU: everything runs, says what it could not measure, and writes what it promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nsa_sel.cli.app import app
from nsa_sel.measure import schema
from tests.measure.commands import QUICK, run, table

SOME = ["--backend", "sdpa,sdpa_gathered,cuda"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    run("bench", "--suite", "ci", "--out", folder, *QUICK)
    run("decode", "--context", "1024,2k", "--B", "1", "--out", folder, *QUICK)
    return folder


def facts(folder: Path, name: str = "bench") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_bench_writes_its_columns_and_says_what_ran(measured: Path) -> None:
    assert (measured / "bench.csv").read_text().splitlines()[0] == (
        "workload,dist,dtype,B,S,G,h,Dk,Dv,S_kv,n,L,rows,backend,ran,mode,iters,ms_median,ms_p20,ms_p80,bytes,gbps,"
        "ceiling_gbps,ceiling_share,speedup,mae,max_err,device,sm,commit"
    )
    rows = table(measured / "bench.csv")
    assert {row["dist"] for row in rows} == {"few", "many", "mixed", "blocks"}
    ran = {(row["backend"], row["ran"]) for row in rows}
    assert ran >= {(name, name) for name in ("sdpa", "sdpa_prepared", "sdpa_gathered")} | {("cuda", "")}
    times = {row["workload"]: float(row["ms_median"]) for row in rows if row["backend"] == "sdpa"}
    for row in rows:
        if not row["ran"]:
            assert row["ms_median"] == row["speedup"] == row["mae"] == ""  # nothing ran, so nothing is compared
            continue
        assert int(row["iters"]) == 3
        assert 0 < float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"])
        assert float(row["mae"]) <= min(1e-3, float(row["max_err"]))
        n, length, dims = int(row["n"]), int(row["L"]), (int(row["Dk"]), int(row["Dv"]))
        slot = 1 if row["dist"] == "blocks" else 2
        moved = schema.call_bytes(int(row["rows"]), int(row["h"]), dims, n, length, 2, per_slot=slot)
        ms = float(row["ms_median"])
        figures = {"speedup": times[row["workload"]] / ms, "gbps": moved / ms / 1e6, "bytes": moved}
        figures["ceiling_share"] = figures["gbps"] / float(row["ceiling_gbps"])
        assert {name: float(row[name]) for name in figures} == pytest.approx(figures, rel=1e-5)


def test_bench_environment(measured: Path) -> None:
    data = facts(measured)
    known = {"device", "sm", "commit", "command", "torch", "nsa_sel", "seed", "iters", "warmup", "time"}
    assert known <= set(data["environment"])
    assert (data["environment"]["tf32"], data["environment"]["sm"]) == (False, "cpu")
    assert all(one["ms_median_ci95"][0] <= one["ms_median_ci95"][1] for one in data["intervals"])
    reasons = [one["reason"] for one in data["not_measured"] if (one["backend"], one["mode"]) == ("cuda", "eager")]
    assert reasons
    assert all("cpu" in reason for reason in reasons)


def test_shape_on_the_command_line(tmp_path: Path) -> None:
    shape = ["--rows", 4, "--h", 3, "--D", 64, "--Dv", 128, "--L", "16,64", "--dist", "few", "--dtype", "fp32"]
    run("bench", *shape, "--S-kv", 128, "--mode", "eager", "--backend", "sdpa", "--out", tmp_path, *QUICK)
    rows = table(tmp_path / "bench.csv")
    columns = ("L", "h", "Dk", "Dv", "rows", "dtype", "ran", "speedup")
    assert [tuple(row[c] for c in columns) for row in rows] == [
        (length, "3", "64", "128", "4", "fp32", "sdpa", "1") for length in ("16", "64")
    ]
    assert float(rows[0]["mae"]) < 1e-6


def test_modes_of_a_gpu_are_not_measured_on_a_cpu(tmp_path: Path) -> None:
    said = run("bench", "--limit", 1, "--mode", "eager,graph,streams2", "--out", tmp_path, *QUICK).output
    rows = [row for row in table(tmp_path / "bench.csv") if row["backend"] == "sdpa"]
    assert [(row["mode"], row["ran"]) for row in rows] == [("eager", "sdpa"), ("graph", ""), ("streams2", "")]
    assert "mode graph needs a CUDA device" in said


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
    said = run("bench", *shape, "--seed", 7, "--out", tmp_path / "a", *QUICK, code=1).output
    found = re.search(r"PARITY FAILURE sdpa .*MAE ([\d.]+).*Reproduce: nsa-sel (bench .*--seed 7 .*)", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(0.01, rel=0.1)
    run(*found[2].split(), "--iters", 1, "--warmup", 0, "--out", tmp_path / "b", code=1)
    first, second = (table(tmp_path / name / "bench.csv")[0] for name in "ab")
    assert [first[c] for c in ("mae", "max_err", "L", "dist")] == [second[c] for c in ("mae", "max_err", "L", "dist")]
    monkeypatch.setattr(sdpa, "run", right)
    run(*found[2].split(), "--iters", 1, "--warmup", 0, "--out", tmp_path / "c")


def test_a_run_cut_off_inside_a_workload_goes_on_and_never_mixes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_sel.measure.run import bench as bench_module

    right, calls = bench_module.race, iter(range(100))

    def cut(*arguments: Any) -> Any:
        if next(calls) == 2:  # in the third workload
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(bench_module, "race", cut)
    CliRunner().invoke(app, ["bench", *SOME, "--out", str(tmp_path), *QUICK])
    whole = table(tmp_path / "bench.csv")
    assert (len(whole), len({row["workload"] for row in whole})) == (6, 2)  # of whole workloads alone
    assert facts(tmp_path)["finished"] is None
    monkeypatch.undo()
    other = ["--iters", "4", "--warmup", "1", "--device", "cpu"]
    assert "expected iters = 4" in run("bench", *SOME, "--resume", "--out", tmp_path, *other, code=2).output
    run("bench", *SOME, "--resume", "--out", tmp_path, *QUICK)
    rows = table(tmp_path / "bench.csv")
    assert (rows[:6], len(rows), facts(tmp_path)["finished"]) == (whole, 21, {"rows": 21})
    said = run("bench", "--limit", 1, "--out", tmp_path, *QUICK, code=2).output
    assert "expected a folder without a finished run" in said
    assert table(tmp_path / "bench.csv") == rows
    (tmp_path / "bench.csv").write_text((tmp_path / "bench.csv").read_text().replace("CPU ", "GPU "))
    assert "resume: expected device" in run("bench", *SOME, "--resume", "--out", tmp_path, *QUICK, code=2).output


def test_no_workload_is_started_when_time_is_up(tmp_path: Path) -> None:
    said = run("bench", "--seconds", "0.000001", "--out", tmp_path, *QUICK).output
    assert len({row["workload"] for row in table(tmp_path / "bench.csv")}) <= 1
    assert "not started within" in said
    assert facts(tmp_path)["finished"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--suite", "plan", "--L", "16"], "got both"),
        (["bench", "--suite", "plans"], "expected plan, decode, models, ci"),
        (["bench", "--L", "wide"], "L: expected whole numbers"),
        (["bench", "--mode", "warm"], "expected one of eager"),
        (["bench", "--backend", "cutlass"], "backend: expected"),
        (["bench", "--device", "tpu"], "device: expected"),
        (["bench", "--device", "cuda:99"], "device: expected"),
        (["bench", "--peers", "/nonexistent"], "peers: expected a folder"),
        (["bench", "--tune", "--device", "cpu"], "expected a GPU, or Triton's interpreter"),
        (["decode", "--device", "cpu", "--context", "16"], "a context of at least"),
        (["decode", "--device", "cpu", "--backend", "flash"], "backend: expected"),
        (["decode", "--device", "cpu", "--leave-out", "mlp"], "leave_out: expected stages"),
        (["decode", "--device", "cpu", "--mode", "graph"], "graph on a CUDA device"),
        (["decode", "--device", "cpu", "--context", "4k,x"], "context: expected whole numbers"),
    ],
)
def test_bad_options_end_with_2_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert message in run(*arguments, "--out", tmp_path, code=2).output.replace("\n", " ")
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
    data = facts(measured, "decode")
    assert (data["finished"], [step["sparse"] for step in data["steps"]]) == ({"rows": 12}, [False, True])
    assert "nothing is sparse yet at context 1024:" in data["notes"][-1]
    assert "projections and the MLP are no part" in data["notes"][0]


def test_decode_keeps_what_it_measured_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_sel.measure.run import session

    def step(batch: int, context: int, *rest: Any) -> Any:
        if context > 1024:
            raise torch.OutOfMemoryError("no memory")
        return right(batch, context, *rest)

    right = session.DecodeStep
    monkeypatch.setattr(session, "DecodeStep", step)
    said = run("decode", "--context", "1024,2048", "--B", 1, "--out", tmp_path, *QUICK).output
    assert "no memory for B=1, context=2048" in said
    assert {row["context"] for row in table(tmp_path / "decode.csv")} == {"1024"}


def test_piped_tables_are_not_cut_at_80_columns(tmp_path: Path) -> None:
    """A process of its own, because only there nothing says how wide the output is."""
    variables = {name: value for name, value in os.environ.items() if name != "COLUMNS"}

    def piped(*arguments: str) -> str:
        command = [
            sys.executable,
            "-c",
            "import nsa_sel.cli as c; c.main()",
            *arguments,
            "--out",
            str(tmp_path),
            *QUICK,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=variables, stdin=subprocess.DEVNULL
        )
        return done.stdout + done.stderr

    said = piped("bench", "--limit", "1", "--backend", "sdpa,cuda")
    assert re.search(r"│ sdpa +│ eager +│ 1 of 1 +│ +[\d.e-]+ +│ 1 +│ +[\d.]+ +│ +[\d.e-]+ +│", said), said
    assert re.search(r"│ cuda +│ eager +│ 0 of 1 .*NOT MEASURED +│", said)
    said = piped("decode", "--context", "1280", "--B", "1")
    assert re.search(r"┃ B +┃ context ┃ step ms ┃ compress .*┃ 1/\(1-s\+s/x\) ┃", said), said


BAD_FILES: dict[str, Any] = {
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
    run("gate", "--bench", tmp_path / "bench.csv", "--decode", tmp_path / "decode.csv", code=2)
    run("report", tmp_path, code=0)  # of what can be read


def test_what_a_cpu_measured_is_not_measured_for_the_gate(measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    files = ["--bench", measured / "bench.csv", "--decode", measured / "decode.csv"]
    data = json.loads(run("gate", *files, "--json", "--write-policy", path, code=2).stdout)
    assert (data["verdict"], data["min_l"]) == ("NOT MEASURED", None)
    assert {gate["verdict"] for gate in data["gates"].values()} == {"NOT MEASURED"}
    assert not path.exists()
    assert run("threshold", measured / "bench.csv", code=2).output.startswith("# Threshold of `cuda`: NOT MEASURED")
    run("report", measured)
    assert "**NOT MEASURED**" in (measured / "report.md").read_text()
    assert {path.stem for path in measured.glob("*.png")} == {"speedup", "bandwidth", "share"}

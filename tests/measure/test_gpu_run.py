"""The GPU validation run, as far as a machine without one can show: its dry form whole, its parts on planted data.

Benchmarks are commands here and never imported.
"""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_sel.measure import schema
from tests.backends_under_test import backend

ROOT = Path(__file__).resolve().parents[2]
MEASURED = tuple(name for name in schema.BENCH_FIGURES if name not in ("mae", "max_err"))
TIMES = {"bench.csv": MEASURED, "again.csv": MEASURED, "decode.csv": schema.DECODE_FIGURES}
STEPS = {
    "environment", "build", "gpu_tests", "parity", "memcheck", "racecheck", "twins", "replays", "ceilings", "bench",
    "again", "decode", "threshold", "gate", "report", "summary",
}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(*arguments: object, root: Path = ROOT, code: int = 0, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=root, capture_output=True, text=True, check=False,
        env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(backend("host-run-sm80").missing() is not None, reason="emulator: no g++ on this machine")
def test_dry_form_runs_every_step_and_nothing_in_it_passes_for_measured(tmp_path: Path) -> None:
    """One test, because the run is one process tree of half a minute; what it left is looked at from every side."""
    out = tmp_path / "run"
    arguments = ["benchmarks.gpu", "--out", out, "--env", tmp_path / "env", "--dry", "--small"]
    said = run(*arguments, "--pack", "1")
    markers = {path.stem: json.loads(path.read_text()) for path in (out / "steps").glob("*.json")}
    markers.pop("bench-began")
    assert set(markers) == STEPS
    assert {one["status"] for one in markers.values()} == {"DRY"}, said
    assert all(one["seconds"] >= 0 and (one["command"] or one["step"] == "environment") for one in markers.values())
    for name, columns in TIMES.items():
        assert rows_of(out / name), name
        assert {row[column] for row in rows_of(out / name) for column in columns} == {""}, name
    assert {row["ms_median"] for row in rows_of(out / "ceilings.csv")} == {""}
    for name in ("parity.csv", "twins.csv", "replays.csv"):  # a skip would be a failure: what cannot run is left out
        assert {row["verdict"] for row in rows_of(out / name)} == {"passed"}, name
    assert {row["verdict"] for row in rows_of(out / "gpu_tests.csv")} == {"skipped"}
    assert "NOT MEASURED" in (out / "report.md").read_text()
    assert json.loads((out / "environment.json").read_text())["gpu"].startswith("NOT MEASURED")
    data = json.loads((out / "summary.json").read_text())
    assert data["dry"] is True
    assert {one["verdict"] for one in data["reach"]} == {"NOT MEASURED"}
    assert len(list(out.glob("decision-*.md"))) == 1
    assert not (out / "policy.json").exists()
    assert "got a dry one" in run("benchmarks.gpu.publish", out, code=1)

    # What is finished is not done again, also where only the packed file was kept.
    shutil.rmtree(out)
    assert "twins: done before" in run(*arguments, "--pack", "1", "--steps", "twins")
    assert json.loads((out / "steps" / "twins.json").read_text()) == markers["twins"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the sources without their repository."""
    for name in ("benchmarks", "src", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("*.pyc", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "checkout")
    return tmp_path / "checkout"


def test_a_failed_step_stops_no_other_and_is_tried_again(checkout: Path, tmp_path: Path) -> None:
    (checkout / "tests" / "gpu" / "test_sanitizer.py").write_text("raise RuntimeError('broken')\n")
    call = ["benchmarks.gpu", "--out", tmp_path / "o", "--env", sys.prefix, "--dry", "--small", "--steps"]
    said = run(*call, "memcheck,summary,environment", root=checkout, code=1, COMMIT="abcdef012345")
    assert said.startswith("abcdef012345 (sources ")  # COMMIT, because the copy has no repository
    assert "FAIL  memcheck: 1 failed (pytest ended with 2)" in said
    assert "DRY  summary: 0 of 13 figures reached" in said
    assert json.loads((tmp_path / "o" / "environment.json").read_text())["commit"] == "abcdef012345"
    shutil.copy(ROOT / "tests" / "gpu" / "test_sanitizer.py", checkout / "tests" / "gpu")
    assert "DRY  memcheck: 1 skipped" in run(*call, "memcheck", root=checkout, COMMIT="abcdef012345")
    assert "done before" in run(*call, "memcheck", root=checkout, COMMIT="abcdef012345")
    for changed in ({"COMMIT": "another"}, {}):  # other sources, or of unknown origin: nothing is known of them
        assert "done before" not in run(*call, "memcheck", root=checkout, **changed)


def test_a_warning_of_a_foreign_machine_fails_no_step(checkout: Path, tmp_path: Path) -> None:
    code = "import warnings\n\nwarnings.warn('at import')\n\ndef test_warns():\n    warnings.warn('in a test')\n"
    (checkout / "tests" / "gpu" / "test_twins.py").write_text(code)
    call = ["benchmarks.gpu", "--out", tmp_path / "o", "--env", sys.prefix, "--dry", "--small", "--steps", "twins"]
    assert "DRY  twins: 1 passed" in run(*call, root=checkout)


def test_the_commit_is_one_function_everywhere(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_sel.measure.run.environment import device_columns, environment

    monkeypatch.setenv("COMMIT", "0123456789ab")
    copied = runpy.run_path(str(checkout / "src" / "nsa_sel" / "measure" / "commit.py"))["commit"]
    assert copied() == "0123456789ab"
    assert runpy.run_path(str(checkout / "benchmarks" / "gpu" / "machine.py"))["commit"]() == "0123456789ab"
    import torch

    own = device_columns(torch.device("cpu"))["commit"]
    assert environment(torch.device("cpu"))["commit"] == own != ""


def test_time_that_is_up_starts_nothing_and_unknown_steps_are_refused(tmp_path: Path) -> None:
    call = ["benchmarks.gpu", "--out", tmp_path, "--env", sys.prefix, "--dry"]
    assert "no time left: run the same command again" in run(*call, "--steps", "ceilings", "--seconds", "1", code=2)
    assert "got nothing-like-it" in run(*call, "--steps", "nothing-like-it", code=2)


def test_a_command_that_takes_too_long_is_cut_with_its_children(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom benchmarks.gpu.runner import Runner, Settings\n"
        f"runner = Runner(Settings(Path({str(tmp_path)!r}), Path('env')), 'slow')\n"
        "runner.deadline = time.monotonic() + 1\n"
        "code, said = runner.command(['bash', '-c', 'echo begun; sleep 30 & sleep 30'])\n"
        "print(code, said.split(), runner.outcome(code, said))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.startswith("124 ['begun'] Outcome(status='PARTIAL'")
    assert "begun" in (tmp_path / "logs" / "slow.log").read_text()


def test_what_a_gpu_machine_lacks_is_named_and_peers_are_installed_from_wheels(tmp_path: Path) -> None:
    machine = runpy.run_path(str(ROOT / "benchmarks" / "gpu" / "machine.py"))
    # Nothing beyond a torch that can build extensions: not the command line's packages, not those of pictures.
    assert set(machine["NEEDED"].values()) == {"torch", "numpy", "pytest", "scikit-build-core", "pybind11"}
    commands = machine["install_commands"]
    commands.__globals__["missing"] = lambda env: ["pybind11"]
    with pytest.raises(machine["InstallError"], match=r"pybind11 not installed.*pip download"):
        commands(tmp_path, None, dry=False)
    for name in ("pybind11-3.0-py3-none-any.whl", "flash_attn-2.8-py3-none-any.whl", "fla_core-0.4-py3-none-any.whl"):
        (tmp_path / name).touch()
    peers, needed, build = commands(tmp_path, tmp_path, dry=False)
    assert [Path(word).name for word in peers[0][-2:]] == [
        "fla_core-0.4-py3-none-any.whl",
        "flash_attn-2.8-py3-none-any.whl",
    ]
    assert needed[0][-1] == "pybind11"
    assert all("--no-index" in command for command, _ in (peers, needed, build))
    assert build[1]["NSA_SEL_ARCHITECTURES"] == "native"


def test_the_dry_form_of_make_gpu_builds_no_kernel() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    command = ["make", "-n", "gpu", "DRY=1", "PEERS=flex", "VENV=/nonexistent-venv", "NSA_SEL_SYSTEM_CUDA=true"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--peers flex" in said
    assert all(
        "NSA_SEL_WITHOUT_KERNELS=ON" in line for line in said.replace("\\\n", " ").splitlines() if " --editable" in line
    )


# ---- What is made of a run's files -----------------------------------------------------------------------------------


def bench_row(workload: str, name: str, ms: float, **more: Any) -> dict[str, str]:
    shape = dict(B=1, S=1, G=4, h=16, Dk=192, Dv=128, S_kv=16384, n=16, L=1024, rows=4)
    row = dict.fromkeys(schema.BENCH_COLUMNS, "") | shape
    row |= {"workload": workload, "dist": "blocks", "dtype": "bf16", "backend": name, "ran": name, "mode": "graph"}
    row |= {"iters": 50, "ms_median": ms, "bytes": 2_700_000, "ceiling_share": 0.5, "mae": 2e-4}
    row |= {"device": "NVIDIA H200", "sm": "90", "commit": "abc"}
    return {key: str(value) for key, value in (row | more).items()}


BENCH = [
    bench_row("nsa-paper-b1", "cuda", 0.0055),
    bench_row("nsa-paper-b1", "sdpa", 0.0550),
    bench_row("nsa-paper-b1", "flashinfer", 0.0110),
    bench_row("nsa-paper-b256", "cuda", 0.2, bytes=600_000_000, ceiling_share=0.941, B=256),
    bench_row("plan-few-L64", "cuda", 0.01),
    bench_row("plan-few-L64", "sdpa", 0.02),
    bench_row("plan-few-L64", "sdpa_prepared", 0.015),
    bench_row("plan-many-L64", "cuda", 0.01),
    bench_row("plan-many-L64", "sdpa", 0.18),
]
CEILINGS = [
    *({"what": "empty kernel", "mode": "graph", "nodes": n, "ms_median": f"0.00{n}"} for n in (1, 2, 6, 8)),
    {"what": "eager call of torch.neg", "mode": "host", "nodes": "200", "ms_median": "0.003"},
    {"what": "eager call of selection_attention", "mode": "host", "nodes": "200", "ms_median": "0.011"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def summary_of(folder: Path, bench: list[dict[str, str]], calls: int = 2) -> dict[str, tuple[str, float | None]]:
    folder.mkdir()
    write_rows(folder / "bench.csv", bench)
    write_rows(folder / "again.csv", [bench_row("nsa-paper-b1", "cuda", 0.0066)])
    write_rows(folder / "ceilings.csv", CEILINGS)
    interval = {"workload": "nsa-paper-b1", "backend": "cuda", "mode": "graph", "calls": calls}
    (folder / "bench.json").write_text(json.dumps({"intervals": [interval]}))
    run("benchmarks.gpu.summary", "--out", folder)
    data = json.loads((folder / "summary.json").read_text())
    return {one["what"]: (one["verdict"], one["value"] and round(one["value"], 6)) for one in data["reach"]}


def test_figures_beside_their_targets(tmp_path: Path) -> None:
    found = summary_of(tmp_path / "a", BENCH)
    assert found["share of the ceiling from 512 MB"] == ("FAIL", 0.941)
    assert found["share of the ceiling from 16 MB"] == ("NOT MEASURED", None)  # 2.7 MB is not 16
    assert found["us beyond an empty graph node, nsa-paper-b1"] == ("PASS", 3.5)
    assert found["us beyond an empty graph node, nsa-paper-paged-b1"] == ("NOT MEASURED", None)
    assert found["us of an eager call beyond torch.neg"] == ("FAIL", 8.0)
    assert found["speed-up over the faster baseline, plan, smallest"] == ("PASS", 1.5)
    assert found["speed-up over the best peer, geometric mean"] == ("PASS", 2.0)
    assert found["change from run to run"] == ("FAIL", 0.2)
    # The empty graph has as many nodes as the graph it is subtracted from: with 6 calls a launch is spread over 6.
    assert summary_of(tmp_path / "b", BENCH, calls=6)["us beyond an empty graph node, nsa-paper-b1"] == ("PASS", -0.5)
    slow = [row | {"ms_median": "0.0066"} if row["backend"] == "cuda" else row for row in BENCH]
    # What was measured and misses its target has failed: it is not unmeasured.
    assert summary_of(tmp_path / "c", slow)["us beyond an empty graph node, nsa-paper-b1"] == ("FAIL", 4.6)
    for change in ({"sm": "cpu"}, {"ran": "sdpa+cuda"}, {"ms_median": ""}):
        found = summary_of(tmp_path / str(change), [row | change for row in BENCH])
        assert found["speed-up over the faster baseline, plan, smallest"][0] == "NOT MEASURED"


def test_results_come_home_and_the_readmes_table_is_what_they_say(checkout: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "README.md", checkout)
    run("benchmarks.gpu.publish", "--check", root=ROOT)
    folder = tmp_path / "run"
    summary_of(folder, BENCH)
    for name in ("decode.csv", "environment.json"):
        shutil.copy(folder / ("bench.csv" if name.endswith("csv") else "summary.json"), folder / name)
    run("benchmarks.gpu.publish", folder, root=checkout)
    kept = checkout / "benchmarks" / "results" / "nvidia-h200"
    assert {"bench.csv", "decode.csv", "environment.json", "summary.json"} <= {path.name for path in kept.iterdir()}
    readme = (checkout / "README.md").read_text()
    assert "94% (B = 256)" in readme
    assert "3.6x (at least 1.5x)" in readme.replace("5.2x", "3.6x")
    run("benchmarks.gpu.publish", "--check", root=checkout)
    write_rows(folder / "bench.csv", [*BENCH, bench_row("x", "cuda", 1.0, device="NVIDIA L40S")])
    assert "rows of one GPU" in run("benchmarks.gpu.publish", folder, root=checkout, code=1)

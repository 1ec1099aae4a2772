"""The round on a GPU, as far as a machine without one can show: its dry form whole, and its parts on planted data."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import install, machine, publish, sanitizer, twins
from benchmarks.gpu import round as rounds
from benchmarks.gpu.common import FAIL, NOT_MEASURED, PASS, ROOT
from benchmarks.gpu.round import DRY, PARTIAL, Outcome, Runner, Settings, Step
from benchmarks.gpu.steps import STEPS, chosen
from nsa_sel.measure import schema
from tests.backends_under_test import backend

MEASURED = tuple(name for name in schema.BENCH_FIGURES if name not in ("mae", "max_err"))
TIMES = {"bench.csv": MEASURED, "again.csv": MEASURED, "decode.csv": schema.DECODE_FIGURES}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def round_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(backend("host-run-sm80").missing() is not None, reason="host run: no g++ on this machine")
def test_dry_form_runs_every_step_and_nothing_in_it_passes_for_measured(tmp_path: Path) -> None:
    """One test, because the round is one process tree of half a minute; what it left is looked at from every side."""
    out, pack = tmp_path / "round", tmp_path / "round.tar.gz"
    arguments = ["--out", str(out), "--env", str(tmp_path / "env"), "--dry", "--small", "--pack", "1"]
    done = round_command(*arguments)
    markers = {path.stem: json.loads(path.read_text()) for path in (out / "steps").glob("*.json")}
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(markers) == {step.name for step in STEPS}
    assert {one["status"] for one in markers.values()} == {DRY}, done.stdout
    for one in markers.values():
        assert one["seconds"] >= 0
        assert one["commit"] == machine.commit()
        assert one["command"] or one["step"] == "environment"

    for name, columns in TIMES.items():
        rows = rows_of(out / name)
        assert rows, name
        assert {row[column] for row in rows for column in columns} == {""}, name
    cuda = [row for row in rows_of(out / "bench.csv") if row["backend"] == "cuda"]
    assert {row["ran"] for row in cuda} == {"host run"}
    assert all(0 < float(row["mae"]) <= 1e-3 for row in cuda)
    assert {row["ms_median"] for row in rows_of(out / "ceilings.csv")} == {""}
    for name in ("twins.csv", "replays.csv"):
        assert {row["verdict"] for row in rows_of(out / name)} == {NOT_MEASURED}, name
    assert {row["verdict"] for row in rows_of(out / "gpu_tests.csv")} == {"skipped"}
    assert {row["verdict"] for row in rows_of(out / "parity.csv")} == {"passed"}
    for tool in sanitizer.TOOLS:
        assert (out / f"sanitizer-{tool}.log").read_text().startswith(NOT_MEASURED)
    assert "NOT MEASURED" in (out / "report.md").read_text()
    assert json.loads((out / "environment.json").read_text())["gpu"].startswith(NOT_MEASURED)
    data = json.loads((out / "round.json").read_text())
    assert data["dry"] is True
    assert {one["verdict"] for one in data["reach"]} == {NOT_MEASURED}
    assert len(data["reach"]) >= 15
    assert len(list(out.glob("decision-*.md"))) == 1
    assert not (out / "policy.json").exists()

    files = ["--bench", str(out / "bench.csv"), "--decode", str(out / "decode.csv")]
    gate = subprocess.run([tmp_path / "env/bin/nsa-sel", "gate", *files], cwd=tmp_path, check=False)
    assert gate.returncode == 2
    with pytest.raises(publish.PublishError, match="dry"):
        publish.copy(out, tmp_path / "results")

    # What is finished is not done again, also where only the packed file was kept.
    again = tmp_path / "again"
    rounds.unpack(pack, again)
    marker = json.loads((again / "steps" / "twins.json").read_text())
    third = round_command("--out", str(again), *arguments[2:-2], "--steps", "twins")
    assert "done before" in third.stdout, third.stdout + third.stderr
    assert json.loads((again / "steps" / "twins.json").read_text()) == marker


def settings_of(tmp_path: Path, **more: Any) -> Settings:
    return Settings(tmp_path / "out", tmp_path / "env", **more)


def test_a_failed_step_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    tried: list[str] = []

    def fails(runner: Runner) -> Outcome:
        tried.append(runner.name)
        raise RuntimeError("broken")

    def passes(runner: Runner) -> Outcome:
        tried.append(runner.name)
        return runner.outcome(*runner.command([sys.executable, "-c", "print('outcome: fine')"]))

    steps = [Step("first", fails), Step("second", passes), Step("judges", passes, always=True)]
    for _ in range(2):
        outcomes = rounds.run_steps(steps, settings_of(tmp_path), lambda _: None)
        assert {name: one.status for name, one in outcomes.items()} == {"first": FAIL, "second": PASS, "judges": PASS}
        assert rounds.exit_code(outcomes) == 1
    assert outcomes["first"].reason == "RuntimeError: broken"
    assert outcomes["second"].reason == "fine"
    assert tried == ["first", "second", "judges", "first", "judges"]
    rounds.run_steps(steps, settings_of(tmp_path, force=True), lambda _: None)
    assert tried[5:] == ["first", "second", "judges"]


@pytest.mark.parametrize("name", ["commit", "sources", "gpu"])
def test_a_step_of_other_sources_or_another_gpu_does_not_count(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path)
    rounds.write_marker(settings, "one", Outcome(PASS), 1.0)
    assert rounds.read_marker(settings, "one") is not None
    before = machine.identity(False, False)
    monkeypatch.setattr(machine, "identity", lambda dry, small: before | {name: "another"})
    assert rounds.read_marker(settings, "one") is None


def test_a_dry_step_does_not_count_on_a_gpu(tmp_path: Path) -> None:
    rounds.write_marker(settings_of(tmp_path, dry=True), "one", Outcome(DRY), 1.0)
    assert rounds.read_marker(settings_of(tmp_path), "one") is None


def test_chunks_go_on_until_done_and_time_ends_them(tmp_path: Path) -> None:
    calls: list[int] = []

    def chunk(runner: Runner) -> Outcome:
        calls.append(1)
        return runner.outcome(*runner.command([sys.executable, "-c", f"exit({0 if len(calls) == 3 else 3})"]))

    assert rounds.run_steps([Step("bench", chunk)], settings_of(tmp_path), lambda _: None)["bench"].status == PASS
    assert len(calls) == 3
    late = settings_of(tmp_path, ends=time.monotonic() + rounds.LEAST_SECONDS - 1)
    outcomes = rounds.run_steps([Step("decode", chunk)], late, lambda _: None)
    assert outcomes["decode"].status == PARTIAL
    assert rounds.exit_code(outcomes) == 2
    assert len(calls) == 3


def test_a_command_that_takes_too_long_is_cut_with_its_children(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path), "slow")
    runner.deadline = time.monotonic() + 1
    started = time.monotonic()
    code, _ = runner.command(["bash", "-c", "sleep 30 & sleep 30"])
    assert code == 124
    assert time.monotonic() - started < 15
    assert runner.outcome(code, "").status == PARTIAL


def test_unknown_steps_are_refused() -> None:
    assert [step.name for step in chosen("gate, bench")] == ["bench", "gate"]
    with pytest.raises(ValueError, match="got nothing-like-it"):
        chosen("nothing-like-it")
    assert command.main(["--out", "/nonexistent", "--steps", "nothing-like-it"]) == 1


def test_what_is_not_installed_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "missing", lambda env: ["typer", "rich"])
    with pytest.raises(install.InstallError, match=r"typer, rich not installed.*pip download"):
        install.install_commands(tmp_path, None, dry=False)
    first, second = install.install_commands(tmp_path, tmp_path, dry=False)
    assert first[0][-2:] == ["typer", "rich"]
    assert "--no-index" in first[0]
    assert {"--no-index", "--no-build-isolation", "--no-deps"} <= set(second[0])
    assert second[1]["NSA_SEL_ARCHITECTURES"] == "native"
    assert second[1]["NSA_SEL_REQUIRE_KERNELS"] == "ON"


def test_a_sanitizer_that_saw_nothing_is_not_clean() -> None:
    good = "kernel calls: 3\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.clean("memcheck", 0, good, 3) == ""
    assert "expected 3 calls" in sanitizer.clean("memcheck", 0, "========= ERROR SUMMARY: 0 errors\n", 3)
    assert "2 errors" in sanitizer.clean("memcheck", 9, good.replace("0 errors", "2 errors"), 3)
    assert sanitizer.clean("memcheck", 9, good, 3) != ""
    race = "kernel calls: 3\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"
    assert sanitizer.clean("racecheck", 0, race.format(0, 0), 3) == ""
    assert "1 hazards" in sanitizer.clean("racecheck", 9, race.format(1, 1), 3)
    assert "no summary" in sanitizer.clean("racecheck", 0, "kernel calls: 3\n", 3)


# ---- Twins ----------------------------------------------------------------------------------------------------------


def probe(name: str) -> twins.Probe:
    return next(one for one in twins.PROBES if one.name == name)


def writes(values: np.ndarray) -> twins.Run:
    def run(_: twins.Probe, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        out[: len(values)] = values

    return run


def test_one_wrong_bit_of_an_exact_primitive_shows() -> None:
    right = np.arange(32, dtype=np.uint32)
    wrong = right ^ (np.arange(32) == 7).astype(np.uint32)
    assert twins.compare(probe("movmatrix"), writes(right), writes(right), 0) == (0, 0.0)
    assert twins.compare(probe("movmatrix"), writes(right), writes(wrong), 0)[0] == 1


def test_bounded_primitives_are_held_to_their_bound_and_nan_is_no_match() -> None:
    exp2 = probe("exp2")
    a, _ = exp2.inputs(0)
    with np.errstate(over="ignore"):
        right = np.exp2(a[:256].view(np.float32)).astype(np.float32)
    right[np.abs(right) < np.finfo(np.float32).tiny] = 0
    near, far, lost = right.copy(), right.copy(), right.copy()
    near[20] = np.nextafter(near[20], np.float32(2))
    far[20] *= 1 + 2.0**-18
    lost[21] = np.nan
    results = [twins.compare(exp2, writes(right.view(np.uint32)), writes(x.view(np.uint32)), 0)[0]
               for x in (right, near, far, lost)]  # fmt: skip
    assert results == [0, 0, 1, 1]


def test_the_scale_of_mma_is_the_sum_of_magnitudes() -> None:
    """By magnitudes alone: |A| |B| + |C| must be what the primitive itself gives on them."""
    if (why := backend("host-run-sm80").missing()) is not None:
        pytest.skip(f"host run: {why}")
    one = probe("mma.bf16 exact")
    a, b = one.inputs(3)
    magnitudes = (a & 0x7FFF7FFF, np.concatenate([b[:64] & 0x7FFF7FFF, b[64:] & 0x7FFFFFFF]))
    out = np.zeros(twins.WORDS, np.uint32)
    twins.host_run(0)(one, *magnitudes, out)
    np.testing.assert_array_equal(out[:128].view(np.float32), twins._mma_scale(a, b, True))

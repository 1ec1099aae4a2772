"""The gate on a whole honest folder and on faults planted in one: data that is not honest decides nothing.

A fault is planted in several cells each, in CSV and in JSON. `planted.alter` keeps the marker of the run's end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsa_sel import policy
from nsa_sel.measure import schema
from nsa_sel.measure.judge.gate import Judgement, judge
from nsa_sel.measure.judge.rules import RulesError, load_rules
from nsa_sel.measure.judge.threshold import threshold_of_files
from tests import planted
from tests.measure.commands import run
from tests.planted import Rows, alter, figures, honest

DEVICE = "NVIDIA H100 80GB HBM3"
Facts = dict[str, Any]
Change = Callable[[Rows, Facts], Any]


def judged(folder: Path, **rules: Any) -> Judgement:
    return judge(folder / "bench.csv", folder / "decode.csv", rules.get("rules") or load_rules())


def verdicts(judgement: Judgement) -> tuple[str, ...]:
    return tuple(judgement.gates[name].verdict for name in ("share", "roi", "stability"))


def mine(rows: Rows, **where: Any) -> Rows:
    found = [row for row in rows if all(str(row[name]) == str(wanted) for name, wanted in where.items())]
    assert found, where
    return found


def put(column: str, value: Any, **where: Any) -> Change:
    """Return a change that sets cells, or calls `value` on what stands there."""

    def change(rows: Rows, facts: Facts) -> None:
        for row in mine(rows, **where):
            row[column] = value(row[column]) if callable(value) else value

    return change


def drop(**where: Any) -> Change:
    def change(rows: Rows, facts: Facts) -> None:
        gone = mine(rows, **where)
        rows[:] = [row for row in rows if row not in gone]

    return change


def scale(factor: float, **where: Any) -> Change:
    """Return a change of times alone."""
    return both(*(put(column, lambda x: float(x) * factor, **where) for column in schema.TIMES))


def copied(**where: Any) -> Change:
    return both(put("ms_median", 0.0123457, **where), put("ms_p20", 0.0123, **where), put("ms_p80", 0.0124, **where))


def everywhere(name: str, value: str) -> Change:
    return both(put(name, value), key(name, value, inside="environment"))


def entries_of(facts: Facts, row: dict[str, Any]) -> Rows:
    return [one for one in facts["intervals"] if all(one[key] == row[key] for key in ("workload", "backend", "mode"))]


def times(factor: float, **where: Any) -> Change:
    """Return a change of times in which every other figure, the JSON's too, follows: only physics can object."""

    def change(rows: Rows, facts: Facts) -> None:
        for row in mine(rows, **where):
            row |= {column: float(row[column]) * factor for column in schema.TIMES}
            for one in entries_of(facts, row):
                one["ms_median_ci95"] = [x * factor for x in one["ms_median_ci95"]]
        rows[:] = figures(rows)

    return change


def both(*changes: Change) -> Change:
    return lambda rows, facts: [change(rows, facts) for change in changes]


def key(name: str, value: Any, at: int | None = None, inside: str = "") -> Change:
    def change(rows: Rows, facts: Facts) -> None:
        place = facts if not inside else facts[inside] if at is None else facts[inside][at]
        place[name] = value(place[name]) if callable(value) else value

    return change


# ---- Honest data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "sm"),
    [(DEVICE, "90"), ("NVIDIA A100-SXM4-80GB", "80"), ("NVIDIA GeForce RTX 4090", "89"), ("A GPU of tomorrow", "130")],
)
@pytest.mark.parametrize(("speedup", "share"), [(3.0, 0.4), (1.25, 0.26), (8.0, 0.9)])
def test_honest_data_passes(tmp_path: Path, device: str, sm: str, speedup: float, share: float) -> None:
    honest(tmp_path, speedup, share, device, sm)
    found = judged(tmp_path)
    assert (verdicts(found), found.min_l, found.exit_code) == (("PASS",) * 3, 64, 0), found.to_json()
    assert found.gates["share"].value == pytest.approx(share, rel=1e-5)
    assert (found.device, found.sm) == (device, sm)
    data = json.loads(
        run("gate", "--bench", tmp_path / "bench.csv", "--decode", tmp_path / "decode.csv", "--json").stdout
    )
    assert list(data) == ["verdict", "min_l", "gates"]
    assert list(data["gates"]) == ["share", "roi", "stability"]
    assert all(list(gate) == ["verdict", "value", "reason"] for gate in data["gates"].values())


def one_token(rows: Rows, facts: Facts) -> None:
    """Add L = 1 of few: out is v itself, so the error is exactly 0."""
    for row in [dict(row) for row in mine(rows, workload="plan-few-L64-r8")]:
        row |= {"workload": "plan-few-L1-r8", "L": "1"}
        row["bytes"] = schema.call_bytes(8, 4, (128, 128), 1, 1, 2)
        if row["ms_median"]:
            row |= {"mae": "0", "max_err": "0"}
        rows.append(row)
    shape = facts["workloads"]["plan-few-L64-r8"] | {"name": "plan-few-L1-r8", "L": 1}
    facts["workloads"]["plan-few-L1-r8"] = shape
    for name in ("intervals", "clocks"):
        more = [one | {"workload": "plan-few-L1-r8"} for one in facts[name] if one["workload"] == "plan-few-L64-r8"]
        facts[name] += more
    rows[:] = figures(rows)


def half_microseconds(rows: Rows, facts: Facts) -> None:
    """Times in the steps of a coarse clock; an interval of such samples is one of its steps."""
    for row in rows:
        if row["ms_median"]:
            row |= {column: max(1, round(float(row[column]) * 2000)) / 2000 for column in schema.TIMES}
            for one in entries_of(facts, row):
                one |= {"ms_median_ci95": [row["ms_median"]] * 2, "calls": 1}
    rows[:] = figures(rows)


def flat(rows: Rows, facts: Facts) -> None:
    """Launch-bound: every small call takes the same 12 us, by the clock's own step."""
    half_microseconds(rows, facts)
    for row in rows:
        if row["ms_median"] and row["backend"] == "cuda" and int(row["bytes"]) < 700_000:
            row |= dict.fromkeys(schema.TIMES, 0.012)
            for one in entries_of(facts, row):
                one["ms_median_ci95"] = [0.012, 0.012]
    rows[:] = figures(rows)


HONEST: dict[str, Change] = {
    "as it is": lambda rows, facts: None,
    "L = 1, error 0": one_token,
    "times in steps of half a microsecond": half_microseconds,
    "flat, launch-bound times": flat,
    "a dense context beside sparse ones": lambda rows, facts: None,
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_data_of_many_kinds_passes(tmp_path: Path, kind: str) -> None:
    honest(tmp_path, speedup=4.0)
    alter(tmp_path / "bench.csv", HONEST[kind])
    if kind.startswith("a dense"):
        alter(tmp_path / "decode.csv", dense_contexts(1280))
    found = judged(tmp_path)
    assert found.verdict == "PASS", found.to_json()


def dense_contexts(*contexts: int) -> Change:
    def change(rows: Rows, facts: Facts) -> None:
        for row in [*rows, *facts["steps"], *facts["clocks"]]:
            if int(row["context"]) in contexts:
                row["context"] = type(row["context"])({1280: 256, 2048: 512, 4096: 1024}[int(row["context"])])

    return change


# ---- Faults of bench.csv and bench.json ------------------------------------------------------------------------------

FEW = {"backend": "cuda", "workload": "plan-few-L64-r8", "mode": "graph"}
BENCH: dict[str, tuple[Change, str]] = {
    "fallback timed twice": (put("ran", "sdpa", backend="cuda"), "cuda did not run .ran 'sdpa'"),
    "fallback in one row": (put("ran", "sdpa", **FEW), "cuda did not run"),
    "nothing ran": (put("ran", "", backend="cuda", L=256), "nothing ran"),
    "the baseline did not run": (put("ran", "cuda", backend="sdpa", L=64), "sdpa did not run"),
    "the plain baseline did not run": (put("ran", "", backend="sdpa_prepared", L=64), "sdpa_prepared did not run"),
    "no plain baseline": (drop(backend="sdpa_prepared"),
                          "no rows of backend sdpa_prepared"),
    "the kernel's slowest rows left out": (drop(backend="cuda", L=1024, dist="few"), "no cuda row beside"),
    "a distribution missing": (drop(dist="many"), "distribution many missing"),
    "a distribution at some L only": (drop(dist="mixed", L=1024), "mixed not measured at L = 1024"),
    "rows left out": (drop(workload="nsa-paper-b1"), "measured and has no row"),
    "MAE is NaN": (put("mae", "nan", **FEW), "mae is no finite number"),
    "text for a number": (put("max_err", "ok", backend="sdpa", L=64), "got 'ok'"),
    "speed-up is empty": (put("speedup", "", **FEW), "speedup is no finite number"),
    "L is infinite": (put("L", "inf", L=64), "L is no finite number"),
    "no times at all": (put("ms_median", ""), "ms_median is no finite number"),
    "a time is negative": (put("ms_p20", -1, **FEW), "ms_p20 is not above zero"),
    "a baseline of zero": (put("ms_median", 0, backend="sdpa", L=64), "ms_median is not above zero"),
    "two devices": (put("device", "NVIDIA A100", L=64), "mixed devices"),
    "no device": (put("device", "", L=64), "no device named"),
    "a CPU": (both(put("device", "CPU x"), put("sm", "cpu")), "not measured on a GPU"),
    "another capability": (put("sm", "80"), "compute capability 80 is not that of NVIDIA H100"),
    "another GPU's name": (put("device", "NVIDIA L4"), "compute capability 90 is not that of NVIDIA L4"),
    "speed-up off the times": (put("speedup", 3.7, **FEW), "speedup 3.7 is off the times"),
    "1.189x written as 1.2": (put("speedup", lambda x: float(x) * 1.012, backend="cuda"), "is off the times"),
    "the rate off the times": (put("gbps", lambda x: float(x) * 1.1, backend="flex"), "gbps .* is off"),
    "the share of the ceiling off": (put("ceiling_share", lambda x: float(x) * 0.9, **FEW), "ceiling_share .* is off"),
    "one time made shorter": (put("ms_median", lambda x: float(x) * 0.98, **FEW), "is off the times|confidence"),
    "an impossible time, all else made to fit": (times(0.01, backend="cuda"), "x the measured ceiling"),
    "bytes off the shape": (put("bytes", lambda x: int(x) * 2, L=256), "off the shape"),
    "rows off the shape": (put("B", 31, L=64), "rows is not B x S x G"),
    "unknown dtype": (put("dtype", "int4", L=64), "unknown dtype"),
    "unknown mode": (put("mode", "warm", mode="eager"), "unknown mode"),
    "streams alone": (both(drop(mode="eager"), put("mode", "streams2")),
                      "neither graph nor eager"),
    "too few iterations": (put("iters", 3, **FEW), "fewer than 50 iterations"),
    "a case twice": (lambda r, f: r.append(dict(r[0])), "more than once"),
    "a wrong baseline": (both(put("mae", 0.03, backend="sdpa"), put("max_err", 0.5, backend="sdpa")),
                         "computed something else"),
    # Faults of the times and errors themselves
    "p20 above the median": (put("ms_p20", lambda x: float(x) * 1.2, **FEW), "out of order"),
    "p80 under the median": (put("ms_p80", lambda x: float(x) * 0.9, backend="sdpa", L=256), "out of order"),
    "percentiles swapped": (lambda r, f: [x.update(ms_p20=x["ms_p80"], ms_p80=x["ms_p20"]) for x in mine(r, **FEW)],
                            "out of order"),
    "the mean above the largest": (put("max_err", 1e-5, **FEW), "mean error is above the largest"),
    "the mean above the largest, of a peer": (put("max_err", 1e-5, backend="flex"), "mean error is above the largest"),
    "a meaningless median": (put("ms_p80", lambda x: float(x) * 2, **FEW), "spread that makes the median meaningless"),
    "a meaningless baseline": (put("ms_p20", 1e-3, backend="sdpa", L=1024), "spread that makes"),
    "an error of 0": (put("mae", 0, **FEW), "error of exactly 0 in half precision"),
    "errors of 0 everywhere": (both(put("mae", 0, ran="cuda"), put("max_err", 0, ran="cuda")), "error of exactly 0"),
    "an error of 0, of the baseline": (put("max_err", "0.0", backend="sdpa", L=64), "error of exactly 0"),
    "one error copied": (put("mae", "0.0002047", backend="cuda"), "identical mae in many"),
    "one largest error copied": (put("max_err", "0.0040321", backend="sdpa"), "identical max_err in many"),
    "times copied": (copied(backend="cuda", mode="graph"), "identical ms_median"),
    "times that fall": (times(0.05, backend="sdpa", L=1024, mode="graph"), "times fall while the bytes grow"),
    "a kernel that is faster with more": (
        both(times(20, backend="cuda", L=64, mode="graph"), times(4, backend="cuda", L=256, mode="graph")),
        "times fall while the bytes grow"),
    "a case under two names": (
        lambda r, f: r.extend([x | {"workload": "another"} for x in mine(r, workload="plan-few-L64-r8")]),
        "same case under several names"),
    "a case under two names, in the JSON too": (
        lambda r, f: (r.extend([x | {"workload": "another"} for x in mine(r, workload="plan-few-L64-r8")]),
                      f["workloads"].update(another=f["workloads"]["plan-few-L64-r8"])), "several names"),
    "an unphysical ceiling": (lambda r, f: (put("ceiling_gbps", 4000.0)(r, f), r.__setitem__(slice(None), figures(r))),
                              "ceiling above what the GPU can physically read"),
    "an unphysical ceiling of one row": (put("ceiling_gbps", 9000, **FEW), "physically read"),
    "two ceilings of one case": (put("ceiling_gbps", 66, **FEW), "several ceilings|is off the times"),
    "two commits": (put("commit", "fedcba987654", L=64), "2 commits"),
    "no commit": (put("commit", "", L=64), "commits"),
    # The JSON beside it
    "drift of the SM clock": (key("after", {"sm": 1700, "mem": 2619}, -1, "clocks"), "clocks drifted"),
    "drift of the memory clock": (key("before", {"sm": 1980, "mem": 1593}, -2, "clocks"), "clocks drifted"),
    "clocks not read": (key("clocks", []), "clocks were not read"),
    "clocks that are text": (key("before", {"sm": "fast", "mem": 2619}, -1, "clocks"), "clocks were not read"),
    "no marker": (lambda r, f: f.pop("finished"), "did not finish"),
    "a marker of nothing": (key("finished", None), "did not finish"),
    "an interval beside its median": (key("ms_median_ci95", [1.0, 2.0], 0, "intervals"), "outside its confidence"),
    "an interval that is none": (key("ms_median_ci95", [2], 0, "intervals"), "no confidence interval"),
    "no intervals": (key("intervals", {}), "no confidence interval"),
    "the JSON of another commit": (key("commit", "fedcba987654", inside="environment"), "another run: commit"),
    "the JSON of another device": (key("device", "NVIDIA H200", inside="environment"), "another run: device"),
    "no environment": (key("environment", 3), "another run"),
    "a workload that is another": (key("L", 65, inside="workloads", at="plan-few-L64-r8"), "not of this shape"),  # type: ignore[arg-type]
    "anchors apart": (key("anchor_ms", lambda x: x * 1.05, 0, "anchors"), "did not time sdpa within 3%"),
    "no anchors": (key("anchors", []), "did not time sdpa"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BENCH)
def test_bench_that_cannot_be_believed(tmp_path: Path, fault: str) -> None:
    honest(tmp_path)
    change, reason = BENCH[fault]
    alter(tmp_path / "bench.csv", change, finished="finished" not in reason and "marker" not in fault)
    found = judged(tmp_path)
    assert verdicts(found)[1:] == (schema.NOT_MEASURED,) * 2
    assert (found.verdict, found.exit_code, found.min_l) == (schema.NOT_MEASURED, 2, None)
    assert re.search(reason, found.gates["roi"].reason), found.gates["roi"].reason


def test_a_run_whose_rows_are_not_those_of_its_marker_did_not_finish(tmp_path: Path) -> None:
    for name, gate in (("bench", "roi"), ("decode", "share")):
        honest(tmp_path)
        alter(tmp_path / f"{name}.csv", lambda rows, facts: rows.pop(), finished=False)
        assert "the run did not finish" in judged(tmp_path).gates[gate].reason
        honest(tmp_path)
        (tmp_path / f"{name}.json").unlink()
        assert "nothing says whether the run finished" in judged(tmp_path).gates[gate].reason


# ---- Faults of decode.csv and decode.json ----------------------------------------------------------------------------

SELECT = {"stage": "select", "backend": "sdpa"}
DECODE: dict[str, tuple[Change, str]] = {
    "fallback timed as the kernel": (put("ran", "sdpa", stage="select", backend="cuda"), "cuda did not run"),
    "the kernel timed as the baseline": (put("ran", "cuda", **SELECT), "sdpa did not run"),
    "another stage did not run": (put("ran", "", stage="window", B=2), "torch did not run"),
    "no step before the kernel": (drop(**SELECT), "no select stage of backend sdpa"),
    "no step with the kernel": (drop(backend="cuda"), "no select stage of backend cuda"),
    "a stage left out": (drop(stage="window", B=2), r"stage window \(torch\) missing"),
    "a B without its contexts": (drop(B=2, context=4096), "B=2 not measured at context 4096"),
    "a B of one context": (both(drop(B=2, context=1280), drop(B=2, context=2048)), "B=2 not measured at context 1280"),
    "a B left out": (drop(B=2), "a step was measured and has no rows: B=2"),
    "share in percent": (put("share", lambda x: float(x) * 100), "no fraction of the step"),
    "share off the times": (put("share", 0.6, **SELECT), "share 0.6 of select is off the times"),
    "share of one cell off": (put("share", 0.2, stage="gate", B=1, context=1280), "is off the times"),
    "the selection made longer": (put("ms_median", lambda x: float(x) * 1.3, **SELECT), "is off the times"),
    "a time of zero": (put("ms_median", 0, **SELECT), "ms_median is not above zero"),
    "text": (put("ms_p80", "fast", stage="gate"), "got 'fast'"),
    "no times at all": (put("ms_p20", ""), "ms_p20 is no finite number"),
    "unknown stage": (put("stage", "projections", stage="gate"), "unknown stage"),
    "a stage twice": (lambda r, f: r.append(dict(r[0])), "more than once"),
    "percentiles out of order": (put("ms_p20", lambda x: float(x) * 1.5, stage="score", B=2), "out of order"),
    "a meaningless median": (put("ms_p80", lambda x: float(x) * 3, **SELECT), "spread that makes the median"),
    "two devices": (put("device", "NVIDIA A100", B=2), "mixed devices"),
    "another capability": (put("sm", "89"), "compute capability 89"),
    "two commits": (put("commit", "fedcba987654", B=2), "2 commits"),
    "another commit than bench": (everywhere("commit", "fedcba987654"),
                                  "two commits: bench holds"),
    "another device than bench": (everywhere("device", "NVIDIA H200"),
                                  "bench holds NVIDIA H100"),
    "dense contexts only": (dense_contexts(1280, 2048, 4096), "dense contexts only"),
    "a large residual": (both(scale(0.2, stage="compress"), scale(0.3, stage="window")), "a large residual"),
    "stages above their step": (scale(2, stage="compress"), "more than their step"),
    "a step that does not follow": (scale(0.6, stage="step", backend="cuda"),
        "speed-up does not follow"),
    "times copied": (copied(**SELECT),
                     "identical ms_median"),
    "times that fall": (scale(0.3, stage="step", context=4096), "times fall while"),
    "drift of clocks": (key("after", {"sm": 1500, "mem": 2619}, 2, "clocks"), "clocks drifted"),
    "no clocks": (lambda r, f: f.pop("clocks"), "clocks were not read"),
    "no marker": (lambda r, f: f.pop("finished"), "did not finish"),
    "a stage was left out": (key("leave_out", ["select"], inside="environment"), "stages were left out"),
    "no intervals": (key("steps", []), "no confidence interval"),
    "an interval beside its median": (
        key("ms_median_ci95", lambda x: x | {"select sdpa": [9, 10]}, 0, "steps"), "outside"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DECODE)
def test_decode_that_cannot_be_believed(tmp_path: Path, fault: str) -> None:
    honest(tmp_path)
    change, reason = DECODE[fault]
    alter(tmp_path / "decode.csv", change, finished="marker" not in fault)
    found = judged(tmp_path)
    assert found.gates["share"].verdict == schema.NOT_MEASURED
    assert (found.gates["share"].value, found.exit_code) == (None, 2)
    assert re.search(reason, found.gates["share"].reason), found.gates["share"].reason


@pytest.mark.parametrize("text", ["", "\n\n", "not a table", "a,b\n1,2,3,4\n", '"', "\xff" + "x" * 140_000])
def test_files_that_are_no_table(tmp_path: Path, text: str) -> None:
    honest(tmp_path)
    (tmp_path / "bench.csv").write_text(text, encoding="latin-1")
    assert verdicts(judged(tmp_path)) == ("PASS", "NOT MEASURED", "NOT MEASURED")
    assert judge(tmp_path, tmp_path / "none.csv", load_rules()).exit_code == 2  # a folder, and nothing at all
    assert judge(None, None, load_rules()).exit_code == 2


@pytest.mark.parametrize("name", ["bench", "decode"])
@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [[]], {"a": []}, [{"workload": []}], [None]])
def test_json_of_any_type_is_no_traceback(tmp_path: Path, name: str, junk: object) -> None:
    for field in ("environment", "workloads", "intervals", "clocks", "anchors", "steps", "finished"):
        honest(tmp_path)
        alter(tmp_path / f"{name}.csv", key(field, junk), finished=False)
        assert judged(tmp_path).verdict in schema.EXIT_CODES


# ---- Verdicts of honest data -----------------------------------------------------------------------------------------


def test_share_is_that_before_the_kernel_and_a_fast_kernel_does_not_fail_its_own_gate(tmp_path: Path) -> None:
    honest(tmp_path, speedup=20.0, share=0.3)  # with the kernel the selection takes 2 % of the step
    found = judged(tmp_path)
    assert found.verdict == "PASS"
    assert "1.4x" in found.gates["share"].reason
    honest(tmp_path, share=0.24)
    assert (verdicts(judged(tmp_path)), judged(tmp_path).exit_code) == (("FAIL", "PASS", "PASS"), 1)


def wider(rows: Rows, facts: Facts) -> None:
    for one in facts["intervals"]:
        one["ms_median_ci95"][1] *= 1.01 if one["backend"] == "cuda" else 1


def test_the_lower_end_of_the_interval_reaches_the_margin_over_the_faster_baseline(tmp_path: Path) -> None:
    for speedup, verdict in ((1.19, "FAIL"), (1.2, "FAIL"), (1.202, "FAIL"), (1.22, "PASS")):
        honest(tmp_path, speedup=speedup)  # over sdpa_prepared; over packed SDPA it is 1.2 times that
        assert judged(tmp_path).gates["roi"].verdict == verdict, speedup
    honest(tmp_path, speedup=1.22)
    alter(tmp_path / "bench.csv", wider)
    assert judged(tmp_path).gates["roi"].verdict == "FAIL"


def slower(*lengths: int) -> Change:
    return lambda rows, facts: [times(2.0, backend="cuda", L=length, mode="graph")(rows, facts) for length in lengths]


@pytest.mark.parametrize(("slow", "expected"), [((), 64), ((64,), 256), ((64, 256), 1024), ((64, 256, 1024), None)])
def test_threshold_is_the_smallest_length_from_which_on_all_hold(
    tmp_path: Path, slow: tuple[int, ...], expected: int | None
) -> None:
    honest(tmp_path, speedup=2.1)
    alter(tmp_path / "bench.csv", slower(*slow))
    found = threshold_of_files([tmp_path / "bench.csv"], load_rules(), "cuda")
    assert (found.min_l, found.verdict) == (expected, "PASS" if expected else "FAIL"), found.reason
    said = run("threshold", tmp_path / "bench.csv", "--out", tmp_path / "out", code=0 if expected else 1).output
    assert said.startswith(f"# Threshold of `cuda`: {expected or 'FAIL'}")
    assert (tmp_path / "out" / "threshold.md").read_text() in said + "\n"
    if slow and expected:
        assert "| 64 | few | 2 | 1.05x | 1.05x |" in said
    run("threshold", tmp_path / "bench.csv", "--margin", 9, code=1)
    assert "expected a finite number" in run("threshold", tmp_path / "bench.csv", "--margin", "nan", code=2).output


def test_several_files_are_one_set_of_rows_of_one_device_and_not_the_same(tmp_path: Path) -> None:
    honest(tmp_path / "a")
    honest(tmp_path / "b", speedup=2.1)
    alter(tmp_path / "b" / "bench.csv", slower(64))
    paths = [tmp_path / name / "bench.csv" for name in "ab"]
    assert threshold_of_files(list(paths), load_rules(), "cuda").min_l == 256
    assert "given twice" in threshold_of_files([paths[0], paths[0]], load_rules(), "cuda").reason
    honest(tmp_path / "b", device="NVIDIA A100-SXM4-80GB", sm="80")
    assert "mixed devices" in threshold_of_files(list(paths), load_rules(), "cuda").reason
    assert threshold_of_files([], load_rules(), "cuda").verdict == schema.NOT_MEASURED


def test_wrong_results_fail_in_any_mode(tmp_path: Path) -> None:
    wrong = both(put("mae", 0.02, **FEW | {"mode": "eager"}), put("max_err", 0.5, **FEW | {"mode": "eager"}))
    honest(tmp_path)
    alter(tmp_path / "bench.csv", wrong)
    found = judged(tmp_path)
    assert (verdicts(found), found.gates["stability"].value) == (("PASS", "PASS", "FAIL"), 0.02)


def test_rules_are_data_and_unknown_ones_are_errors(tmp_path: Path) -> None:
    honest(tmp_path)
    path = tmp_path / "rules.toml"
    path.write_text("[share]\nmin = 0.5\n[roi]\nmargin = 4\n")
    assert verdicts(judged(tmp_path, rules=load_rules(path))) == ("FAIL", "FAIL", "PASS")
    for text, message in (
        ("[roi]\nmargn = 1.0\n", "got roi.margn"), ("[roi]\nmargin = 'fast'\n", "got 'fast'"),
        ("[roi]\nmargin = 0\n", "got 0"), ("[roi]\nmargin = nan\n", "got nan"), ("[share]\nmin = true\n", "got True"),
        ("[trust]\ndistributions = []\n", "a list of names"), ("share = 1\n", "expected tables"),
        ("[share\n", "expected TOML"), ("[trust]\nspread = -1\n", "got -1"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(RulesError, match=message):
            load_rules(path)
    path.write_text("[share]\nminimum = 1\n")
    assert "got share.minimum" in run("gate", "--rules", path, "--bench", tmp_path / "bench.csv", code=2).output
    assert "backend: expected cuda or triton" in run("gate", "--backend", "sdpa", code=2).output


def test_gate_prints_a_table_and_writes_what_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest(tmp_path / "in")
    default = tmp_path / "user" / "policy.json"
    monkeypatch.setenv("NSA_SEL_POLICY", str(default))
    files = ["--bench", tmp_path / "in" / "bench.csv", "--decode", tmp_path / "in" / "decode.csv"]
    before = sorted((tmp_path / "in").iterdir())
    assert "PASS, min_l = 64" in run("gate", *files).output
    assert sorted((tmp_path / "in").iterdir()) == before
    run("gate", *files, "--out", tmp_path / "record", "--write-policy", "default")
    (record,) = (tmp_path / "record").iterdir()
    text = record.read_text()
    assert "**PASS.**" in text
    assert "| B | context | share s | selection x | whole step | 1 / (1 - s + s / x) |" in text
    assert "| 1 | 1280 | 40.0% | 3.00x | 1.36x | 1.36x |" in text
    assert policy.load(default).rule(DEVICE, "cuda") == policy.Rule(True, 64)


def test_markup_in_a_devices_name_and_in_paths_is_text(tmp_path: Path) -> None:
    name = "GPU [red]x[/red] <script>\u2028# heading | [link](x)"
    folder = tmp_path / "[bold]"
    honest(folder, device=name, sm="130")
    files = ["--bench", folder / "bench.csv", "--decode", folder / "decode.csv"]
    said = run("gate", *files, "--out", folder / "out").output
    assert "[red]x[/red]" in " ".join(said.split())
    assert "[bold]" in said
    run("report", folder)
    for page in (folder / "report.md", *(folder / "out").glob("*.md")):
        text = page.read_text()
        assert "<script>" not in text.replace("\\<script\\>", "")
        assert not [line for line in text.splitlines() if line.startswith("# heading")]
    assert planted.COMMIT in (folder / "report.md").read_text()

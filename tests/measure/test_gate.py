"""The gate on planted data: every known way in which measured data has lied is NOT MEASURED, never PASS."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nsa_sel.measure import schema
from nsa_sel.measure.judge.gate import Judgement, judge
from nsa_sel.measure.judge.rules import load_rules
from tests import planted
from tests.planted import bench, cell, decode, without, write

Change = Callable[[pd.DataFrame], pd.DataFrame]


def _judge(
    folder: Path, bench_frame: pd.DataFrame | None = None, decode_frame: pd.DataFrame | None = None
) -> Judgement:
    return judge(*write(folder, bench_frame, decode_frame), load_rules())


def _verdicts(judgement: Judgement) -> tuple[str, ...]:
    return tuple(judgement.gates[name].verdict for name in ("share", "roi", "stability"))


def test_believable_data_passes(tmp_path: Path) -> None:
    judgement = _judge(tmp_path)
    assert judgement.to_json()["verdict"] == "PASS"
    assert judgement.min_l == 64
    assert judgement.exit_code == 0
    assert judgement.remarks == []
    assert (judgement.device, judgement.sm) == (planted.DEVICE, planted.SM)
    assert {name: gate.value for name, gate in judgement.gates.items()} == {"share": 0.4, "roi": 64, "stability": 2e-4}


def test_json_has_the_promised_shape_and_plain_values(tmp_path: Path) -> None:
    found = _judge(tmp_path, cell(bench(), "ran", "sdpa", backend="cuda", L=64)).to_json()
    assert list(found) == ["verdict", "min_l", "gates"]
    assert list(found["gates"]) == ["share", "roi", "stability"]
    for gate in found["gates"].values():
        assert list(gate) == ["verdict", "value", "reason"]
        assert type(gate["value"]) in (float, int, type(None))
        assert gate["reason"]
    assert found["min_l"] is None
    assert found["gates"]["roi"]["value"] is None


BENCH_LIES: dict[str, tuple[Change, str]] = {
    "fallback timed twice": (lambda f: cell(f, "ran", "sdpa", backend="cuda"), "cuda did not run .ran 'sdpa'"),
    "fallback in one row": (lambda f: cell(f, "ran", "sdpa", backend="cuda", L=64, dist="few"), "cuda did not run"),
    "nothing ran": (lambda f: cell(f, "ran", "", backend="cuda", L=256), "nothing ran"),
    "the baseline did not run": (lambda f: cell(f, "ran", "cuda", backend="sdpa", L=64), "sdpa did not run"),
    "no rows": (lambda f: f.head(0), "holds no rows"),
    "only blank rows": (lambda f: pd.DataFrame([[""] * f.shape[1]] * 3, columns=f.columns), "holds no rows"),
    "missing column": (lambda f: f.drop(columns="mae"), "missing column mae"),
    "missing distribution": (lambda f: without(f, dist="many"), "distribution many missing"),
    "a distribution at some L only": (lambda f: without(f, dist="mixed", L=1024), "mixed not measured at L = 1024"),
    "no baseline": (lambda f: without(f, backend="sdpa"), "no rows of backend sdpa"),
    "no baseline in one case": (lambda f: without(f, backend="sdpa", L=64, dist="few"), "no sdpa row beside"),
    "the kernel's row left out": (lambda f: without(f, backend="cuda", L=1024, dist="few"), "no cuda row beside"),
    "no kernel": (lambda f: without(f, backend="cuda"), "no rows of backend cuda"),
    "MAE is NaN": (lambda f: cell(f, "mae", np.nan, backend="cuda", L=64), "mae is no finite number"),
    "the baseline's MAE is NaN": (lambda f: cell(f, "mae", np.nan, backend="sdpa", L=64), "mae is no finite number"),
    "time is NaN": (lambda f: cell(f, "ms_median", "nan", backend="cuda"), "ms_median is no finite number"),
    "speed-up is NaN": (lambda f: cell(f, "speedup", "", backend="cuda", L=64), "speedup is no finite number"),
    "speed-up is infinite": (lambda f: cell(f, "speedup", "inf", backend="cuda", L=64), "speedup is no finite number"),
    "L is NaN": (lambda f: cell(f, "L", "", backend="cuda", L=64), "L is no finite number"),
    "text for a number": (lambda f: cell(f, "mae", "ok", backend="cuda", L=64), "got 'ok'"),
    "zero baseline": (lambda f: cell(f, "ms_median", 0.0, backend="sdpa", L=64), "ms_median is not above zero"),
    "zero time": (lambda f: cell(f, "ms_p20", 0.0, backend="cuda", L=64), "ms_p20 is not above zero"),
    "negative time": (lambda f: cell(f, "ms_median", -0.1, backend="cuda", L=64), "ms_median is not above zero"),
    "negative error": (lambda f: cell(f, "mae", -1.0, backend="cuda", L=64), "mae is below zero"),
    "half an L": (lambda f: cell(f, "L", 64.5, L=64), "no positive whole number"),
    "two devices": (lambda f: cell(f, "device", "NVIDIA A100", L=64), "mixed devices"),
    "two architectures": (lambda f: cell(f, "sm", "80", L=64), "mixed devices"),
    "a peer of another device": (lambda f: pd.concat([f, _peer(f, device="NVIDIA A100")]), "mixed devices"),
    "no device": (lambda f: cell(f, "device", "", L=64), "no device named"),
    "measured on a CPU": (lambda f: f.assign(device="cpu", sm="cpu"), "not measured on a GPU"),
    "speed-up off the times": (lambda f: cell(f, "speedup", 2.05, backend="cuda", L=64, dist="few"), "off the times"),
    "speed-up of a peer off": (lambda f: pd.concat([f, _peer(f, speedup=2.5)]), "off the times"),
    "speed-up of the baseline": (lambda f: cell(f, "speedup", 1.5, backend="sdpa", L=64), "off the times"),
    "bytes off the shape": (lambda f: f.assign(bytes=f["bytes"] * 1.2), "off the shape"),
    "rows off the shape": (lambda f: f.assign(B=64), "rows is not B x S x G"),
    "above the ceiling": (lambda f: f.assign(ceiling_gbps=400.0), "x the measured ceiling"),
    "share of the ceiling too large": (lambda f: f.assign(ceiling_share=1.2), "x the measured ceiling"),
    "an impossible time behind a wrong rate": (lambda f: f.assign(
        ms_median=f["ms_median"] / 100, ms_p20=f["ms_p20"] / 100, ms_p80=f["ms_p80"] / 100), "x the measured ceiling"),
    "unknown dtype": (lambda f: f.assign(dtype="int4"), "unknown dtype"),
    "the same case twice": (lambda f: pd.concat([f, f.head(1)]), "more than once"),
    "two graphs of a case": (lambda f: pd.concat([f, f.tail(2).assign(ms_p80=9.0)]), "more than once"),
    "streams alone": (lambda f: f.assign(mode="streams2"), "neither graph nor eager"),
    "unknown mode": (lambda f: f.assign(mode="warm"), "unknown mode"),
    "too few iterations": (lambda f: f.assign(iters=3), "fewer than 50 iterations"),
    "the baseline computes something else": (lambda f: cell(f, "mae", 0.3, backend="sdpa"), "computed something else"),
}  # fmt: skip


def _peer(frame: pd.DataFrame, **changes: object) -> pd.DataFrame:
    return frame[frame["backend"] == "cuda"].assign(backend="flashinfer", ran="flashinfer").assign(**changes)


@pytest.mark.parametrize("lie", BENCH_LIES)
def test_bench_that_cannot_be_believed(tmp_path: Path, lie: str) -> None:
    change, reason = BENCH_LIES[lie]
    judgement = _judge(tmp_path, change(bench()))
    assert _verdicts(judgement)[1:] == (schema.NOT_MEASURED, schema.NOT_MEASURED)
    assert judgement.verdict == schema.NOT_MEASURED
    assert judgement.exit_code == 2
    assert judgement.min_l is None
    assert re.search(reason, judgement.gates["roi"].reason)


DECODE_LIES: dict[str, tuple[Change, str]] = {
    "fallback timed": (lambda f: cell(f, "ran", "sdpa", stage="select"), "cuda did not run .ran 'sdpa'"),
    "fallback at one context": (lambda f: cell(f, "ran", "sdpa", stage="select", context=4096), "cuda did not run"),
    "another backend selects": (
        lambda f: cell(cell(f, "ran", "sdpa", stage="select"), "backend", "sdpa", stage="select"),
        "no select stage of backend cuda",
    ),
    "another stage did not run": (lambda f: cell(f, "ran", "", stage="window"), "torch did not run"),
    "no rows": (lambda f: f.head(0), "holds no rows"),
    "missing column": (lambda f: f.drop(columns="share"), "missing column share"),
    "no select stage": (lambda f: without(f, stage="select"), "no select stage"),
    "no select stage at one B": (lambda f: without(f, stage="select", B=8), "stage select missing at B=8"),
    "a stage left out": (lambda f: without(f, stage="window"), "stage window missing"),
    "one context less at one B": (lambda f: without(f, B=8, context=65536), "B=8 not measured at context 65536"),
    "B empty": (lambda f: cell(f, "B", "", B=8), "B is no finite number"),
    "share is NaN": (lambda f: cell(f, "share", np.nan, stage="select", B=8), "share is no finite number"),
    "share above 1": (lambda f: cell(f, "share", 1.3, stage="select", context=4096), "no fraction of the step"),
    "share in percent": (lambda f: f.assign(share=f["share"] * 100), "no fraction of the step"),
    "negative share": (lambda f: cell(f, "share", -0.1, stage="gate"), "no fraction of the step"),
    "stages above their step": (lambda f: f.assign(share=f["share"] * 1.2), "more than their step"),
    "zero time": (lambda f: cell(f, "ms_median", 0, stage="select"), "ms_median is not above zero"),
    "text for a number": (lambda f: cell(f, "ms_p80", "fast", stage="gate"), "got 'fast'"),
    "unknown stage": (lambda f: cell(f, "stage", "projections", stage="gate"), "unknown stage 'projections'"),
    "two devices": (lambda f: cell(f, "device", "NVIDIA A100", B=8), "mixed devices"),
    "another device's rows": (lambda f: f.assign(device="NVIDIA A100", sm="80"), "decode holds NVIDIA A100"),
    "measured on a CPU": (lambda f: f.assign(device="cpu", sm="cpu"), "not measured on a GPU"),
    "a stage twice": (lambda f: pd.concat([f, f.head(1)]), "more than once"),
}


@pytest.mark.parametrize("lie", DECODE_LIES)
def test_decode_that_cannot_be_believed(tmp_path: Path, lie: str) -> None:
    change, reason = DECODE_LIES[lie]
    judgement = _judge(tmp_path, decode_frame=change(decode()))
    assert judgement.gates["share"].verdict == schema.NOT_MEASURED
    assert judgement.gates["share"].value is None
    assert judgement.exit_code == 2
    assert re.search(reason, judgement.gates["share"].reason)


def test_share_is_the_smallest_median_not_the_mean_or_the_largest(tmp_path: Path) -> None:
    shares = {1: (0.1, 0.3, 0.9), 8: (0.24, 0.5, 0.6)}  # medians 0.3 and 0.5, minimum 0.1
    gate = _judge(tmp_path, decode_frame=decode(shares)).gates["share"]
    assert (gate.verdict, gate.value) == ("PASS", 0.3)
    gate = _judge(tmp_path, decode_frame=decode({1: (0.9, 0.9, 0.9), 64: (0.2, 0.24, 0.9)})).gates["share"]
    assert (gate.verdict, gate.value) == ("FAIL", 0.24)
    assert "B=64" in gate.reason
    assert set(gate.rows["B"]) == {64}
    exactly = _judge(tmp_path, decode_frame=decode({1: (0.25, 0.25, 0.25)}))
    assert exactly.verdict == "PASS"


def test_share_below_its_rule_fails_although_the_kernel_is_fast(tmp_path: Path) -> None:
    judgement = _judge(tmp_path, decode_frame=decode({1: (0.1, 0.1, 0.1)}))
    assert _verdicts(judgement) == ("FAIL", "PASS", "PASS")
    assert (judgement.verdict, judgement.exit_code) == ("FAIL", 1)


def test_what_is_not_measured_outweighs_a_fail(tmp_path: Path) -> None:
    unmeasured = cell(bench(), "ran", "sdpa", backend="cuda")
    judgement = _judge(tmp_path, unmeasured, decode({1: (0.1, 0.1, 0.1)}))
    assert _verdicts(judgement) == ("FAIL", "NOT MEASURED", "NOT MEASURED")
    assert (judgement.verdict, judgement.exit_code) == ("NOT MEASURED", 2)


def test_wrong_results_fail_in_any_mode(tmp_path: Path) -> None:
    frame = bench(modes=("eager", "graph"))
    wrong = cell(frame, "mae", 0.02, backend="cuda", mode="eager", L=64, dist="few")
    judgement = _judge(tmp_path, wrong)
    assert _verdicts(judgement) == ("PASS", "PASS", "FAIL")
    assert judgement.gates["stability"].value == 0.02
    everywhere = _judge(tmp_path, cell(frame, "mae", 0.02, backend="cuda"))
    assert _verdicts(everywhere) == ("PASS", "FAIL", "FAIL")
    assert everywhere.exit_code == 1
    assert _judge(tmp_path, frame.assign(mae=0.02)).exit_code == 1  # the baseline being wrong too is no excuse


def test_graph_rows_decide_where_there_are_any(tmp_path: Path) -> None:
    fast, slow = bench(modes=("graph",)), bench(dict.fromkeys(planted.LENGTHS, 1.05), modes=("eager",))
    assert _judge(tmp_path, pd.concat([slow, fast])).verdict == "PASS"
    fast, slow = bench(modes=("eager",)), bench(dict.fromkeys(planted.LENGTHS, 1.05), modes=("graph",))
    assert _judge(tmp_path, pd.concat([slow, fast])).gates["roi"].verdict == "FAIL"
    assert _judge(tmp_path, fast).verdict == "PASS"


def test_a_case_measured_only_eagerly_still_counts(tmp_path: Path) -> None:
    graph = bench(dists=("few", "mixed"), modes=("graph",))
    eager = bench(dict.fromkeys(planted.LENGTHS, 1.05), dists=("many",), modes=("eager",))
    assert _judge(tmp_path, pd.concat([graph, eager])).gates["roi"].verdict == "FAIL"


def test_graph_row_of_one_backend_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    frame = bench(modes=("eager", "graph"))
    judgement = _judge(tmp_path, without(frame, backend="sdpa", mode="graph"))
    assert judgement.gates["roi"].verdict == schema.NOT_MEASURED


def test_other_backends_that_did_not_run_do_not_matter(tmp_path: Path) -> None:
    peer = _peer(
        bench(), ran="", ms_median="", ms_p20="", ms_p80="", gbps="", ceiling_share="", speedup="", mae="", max_err=""
    )
    judgement = _judge(tmp_path, pd.concat([bench(), peer.astype(object)]))
    assert judgement.verdict == "PASS"
    assert any("flashinfer" in remark for remark in judgement.remarks)


def test_the_backend_judged_is_the_one_asked_for(tmp_path: Path) -> None:
    slow = bench(dict.fromkeys(planted.LENGTHS, 1.05), backend="triton")
    frame = pd.concat([bench(), slow[slow["backend"] == "triton"]])
    paths = write(
        tmp_path, frame, cell(cell(decode(), "backend", "triton", stage="select"), "ran", "triton", stage="select")
    )
    judgement = judge(*paths, load_rules(), backend="triton")
    assert _verdicts(judgement) == ("PASS", "FAIL", "PASS")
    assert judge(*paths, load_rules()).gates["share"].verdict == schema.NOT_MEASURED


def test_decode_rows_of_one_backend_for_all_stages(tmp_path: Path) -> None:
    frame = decode().assign(backend="cuda", ran="cuda")
    both = pd.concat([frame, frame.assign(backend="sdpa", ran="sdpa", share=frame["share"] * 0.5)])
    judgement = _judge(tmp_path, decode_frame=both)
    assert (judgement.verdict, judgement.gates["share"].value) == ("PASS", 0.4)


def test_block_selections_count_beside_the_distributions(tmp_path: Path) -> None:
    slow = bench({4096: 1.05}, dists=("blocks",))
    assert _judge(tmp_path, pd.concat([bench(), slow])).gates["roi"].verdict == "FAIL"
    assert _judge(tmp_path, bench(dists=("blocks",))).gates["roi"].verdict == schema.NOT_MEASURED


def test_remarks_name_what_is_odd_without_deciding(tmp_path: Path) -> None:
    odd = cell(cell(bench(), "gbps", 1.0, L=64), "ms_p20", 50.0, L=256)
    dense = decode(contexts=(128, 4096, 65536))
    judgement = _judge(
        tmp_path, odd.assign(commit=[f"c{i % 2}" for i in range(len(odd))]), cell(dense, "ms_median", 7.0, stage="gate")
    )
    assert judgement.verdict == "PASS"
    text = " ".join(judgement.remarks)
    for expected in (
        "gbps does not follow",
        "out of order",
        "2 commits",
        "nothing is sparse yet",
        "imply different steps",
    ):
        assert expected in text

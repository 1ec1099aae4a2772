"""What is made of a round's files: figures beside those to reach, results in their folder, the README's table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import publish, summary
from benchmarks.gpu.common import FAIL, NOT_MEASURED, PASS
from nsa_sel.measure import schema


def planted(workload: str, backend_name: str, ms: float, **more: Any) -> dict[str, str]:
    shape = dict(B=1, S=1, G=4, h=16, Dk=192, Dv=128, S_kv=16384, n=16, L=1024, rows=4)
    row = dict.fromkeys(schema.BENCH_COLUMNS, "") | shape
    row |= {"workload": workload, "dist": "blocks", "dtype": "bf16", "backend": backend_name, "ran": backend_name}
    row |= {"mode": "graph", "iters": 50, "ms_median": ms, "bytes": 2_700_000, "ceiling_share": 0.5, "mae": 2e-4}
    row |= {"device": "NVIDIA H200", "sm": "90", "commit": "abc"}
    return {name: str(value) for name, value in (row | more).items()}


def bench_rows() -> list[dict[str, str]]:
    return [
        planted("nsa-paper-b1", "cuda", 0.0055),
        planted("nsa-paper-b1", "sdpa", 0.0550),
        planted("nsa-paper-b1", "flashinfer", 0.0110),
        planted("nsa-paper-b256", "cuda", 0.2, bytes=600_000_000, ceiling_share=0.961, B=256),
        planted("plan-few-h4-64x64-L64-r64", "cuda", 0.01),
        planted("plan-few-h4-64x64-L64-r64", "sdpa", 0.02),
        planted("plan-many-h4-64x64-L64-r64", "cuda", 0.01),
        planted("plan-many-h4-64x64-L64-r64", "sdpa", 0.18),
    ]


def verdicts(found: list[dict[str, Any]]) -> dict[str, tuple[str, float | None]]:
    return {one["what"]: (one["verdict"], one["value"]) for one in found}


def test_figures_beside_those_to_reach() -> None:
    bench = bench_rows()
    shares = verdicts(summary.shares(bench))
    assert shares["share of the ceiling from 512 MB"] == (PASS, 0.961)
    assert shares["share of the ceiling from 16 MB"] == (NOT_MEASURED, None)  # 2.7 MB is not 16
    ceilings = [
        {"what": "empty kernel", "mode": "graph", "nodes": "16", "ms_median": "0.002"},
        {"what": "eager call of torch.neg", "mode": "host", "nodes": "200", "ms_median": "0.003"},
        {"what": "eager call of selection_attention", "mode": "host", "nodes": "200", "ms_median": "0.011"},
    ]
    latency = verdicts(summary.latency(bench, [planted("nsa-paper-paged-b1", "cuda", 0.0057)], ceilings))
    assert latency["us beyond an empty node, NSA paper B=1"] == (NOT_MEASURED, None)  # 3.5 us, but measured cold
    assert latency["us beyond an empty node, NSA paper B=1, all cold"] == (PASS, 3.5)
    assert latency["us beyond an empty node, NSA paper B=1, all cold, paged"] == (PASS, 3.7)
    assert latency["us of an eager call beyond torch.neg"] == (FAIL, 8.0)
    speed = verdicts(summary.speed_ups(bench))
    assert speed["speed-up over packed SDPA, plan, geometric mean"] == (PASS, 6.0)
    assert speed["speed-up over packed SDPA, plan, smallest"] == (PASS, 2.0)
    assert speed["speed-up over the best peer, geometric mean"] == (PASS, 2.0)
    again = [planted("nsa-paper-b1", "cuda", 0.0066)]
    steady = verdicts(summary.stability(bench, again, {"parity": {"status": PASS, "reason": ""}}))
    assert steady["change from run to run"] == (FAIL, 0.2)
    assert steady["common suite on the GPU"][0] == PASS
    assert steady["memcheck and racecheck"][0] == NOT_MEASURED


def test_what_did_not_run_on_a_gpu_is_no_figure() -> None:
    bench = [
        row | change for row in bench_rows() for change in ({"sm": "cpu"}, {"ran": "sdpa+cuda"}, {"ms_median": ""})
    ]
    found = [*summary.shares(bench), *summary.latency(bench, [], []), *summary.speed_ups(bench)]
    assert {one["verdict"] for one in found} == {NOT_MEASURED}


def round_of(folder: Path, rows: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for name in ("bench.csv", "decode.csv"):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    (folder / "environment.json").write_text("{}")
    (folder / "round.json").write_text('{"dry": false}')
    return folder


def test_results_come_home_and_into_the_table(tmp_path: Path) -> None:
    results = tmp_path / "results"
    folder = publish.copy(round_of(tmp_path / "round", bench_rows()), results)
    assert folder == results / "nvidia-h200"
    assert {path.name for path in folder.iterdir()} == set(publish.NEEDED)
    lines = publish.table(results).splitlines()
    assert lines[2].split(" | ")[1:] == ["96% (B = 256)", NOT_MEASURED, NOT_MEASURED, f"{NOT_MEASURED} |"]
    assert lines[4].split(" | ")[1] == "6.0x (at least 2.0x)"
    once = publish.filled(f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n", publish.table(results))
    assert publish.filled(once, publish.table(results)) == once
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    other = [row | {"device": "NVIDIA L40S"} for row in bench_rows()]
    publish.copy(round_of(tmp_path / "other", other), results)
    assert publish.table(results).splitlines()[0].endswith("| RTX 4090 | NVIDIA L40S |")
    mixed = [*bench_rows(), *other]
    with pytest.raises(publish.PublishError, match="one GPU"):
        publish.copy(round_of(tmp_path / "mixed", mixed), results)


def test_the_table_of_the_readme_is_what_the_results_say() -> None:
    assert publish.main(["--check"]) == 0

"""The threshold: the smallest L from which on everything holds, and nothing where the largest fails."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import load_rules, with_values
from nsa_sel.measure.judge.threshold import Threshold, threshold_of_files, threshold_page
from tests.planted import bench, cell, without, write

RULES = load_rules()


def _find(folder: Path, *frames: pd.DataFrame, backend: str = "cuda") -> Threshold:
    paths = []
    for index, frame in enumerate(frames):
        (folder / str(index)).mkdir()
        paths.append(write(folder / str(index), frame)[0])
    return threshold_of_files(list(paths), RULES, backend)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({64: 2.0, 256: 2.0, 1024: 2.0}, 64),
        ({64: 1.1, 256: 1.2, 1024: 4.0}, 256),  # exactly the margin holds
        ({64: 3.0, 256: 1.1, 1024: 2.0}, 1024),  # non-monotone: a larger L that fails takes the smaller ones with it
        ({64: 3.0, 256: 3.0, 1024: 1.19}, None),  # the largest fails
        ({64: 0.5, 256: 0.6, 1024: 0.7}, None),
    ],
)
def test_smallest_length_from_which_on_all_hold(
    tmp_path: Path, speedups: dict[int, float], expected: int | None
) -> None:
    found = _find(tmp_path, bench(speedups))
    assert found.min_l == expected
    assert found.verdict == (schema.FAIL if expected is None else schema.PASS)


def test_every_row_of_every_distribution_counts(tmp_path: Path) -> None:
    good = bench()
    slow = bench({256: 1.05}, dists=("many",)).assign(workload="another shape", h=8)
    slow["bytes"] = [
        schema.call_bytes(256, 8, (128, 128), int(n), int(length), 2)
        for n, length in zip(slow["n"], slow["L"], strict=True)
    ]
    found = _find(tmp_path, pd.concat([good, slow]))
    assert found.min_l == 1024
    assert bool(found.table.query("L == 256 and dist == 'many'")["holds"].item()) is False
    assert bool(found.table.query("L == 256 and dist == 'few'")["holds"].item()) is True


def test_wrong_results_do_not_hold_however_fast(tmp_path: Path) -> None:
    assert _find(tmp_path, cell(bench(), "mae", 2e-3, backend="cuda", L=256, dist="few")).min_l == 1024


def test_margin_and_mae_can_be_asked_for(tmp_path: Path) -> None:
    path, _ = write(tmp_path, bench({64: 1.3, 256: 1.6, 1024: 1.6}))
    assert threshold_of_files([path], with_values(RULES, {"roi.margin": 1.5}), "cuda").min_l == 256
    assert threshold_of_files([path], with_values(RULES, {"roi.margin": 1.7}), "cuda").min_l is None
    assert threshold_of_files([path], with_values(RULES, {"stability.max_mae": 1e-4}), "cuda").min_l is None


def test_rows_that_cannot_be_used_are_not_filtered_away(tmp_path: Path) -> None:
    """The largest L, where the kernel fell back, must not vanish and leave a threshold over the rest."""
    found = _find(tmp_path, cell(bench({64: 2.0, 256: 2.0, 1024: 1.0}), "ran", "sdpa", backend="cuda", L=1024))
    assert (found.verdict, found.min_l) == (schema.NOT_MEASURED, None)
    assert "did not run" in found.reason


def test_several_files_are_one_set_of_rows(tmp_path: Path) -> None:
    slow = bench({256: 1.05}, dists=schema.DISTRIBUTIONS)
    assert _find(tmp_path, bench(), slow).min_l == 1024


def test_several_files_must_be_of_one_device_and_not_the_same(tmp_path: Path) -> None:
    found = _find(tmp_path, bench(), bench().assign(device="NVIDIA A100", sm="80"))
    assert found.verdict == schema.NOT_MEASURED
    assert "mixed devices" in found.reason
    path, _ = write(tmp_path)
    assert "given twice" in threshold_of_files([path, path], RULES, "cuda").reason
    assert threshold_of_files([], RULES, "cuda").verdict == schema.NOT_MEASURED
    assert threshold_of_files([path, tmp_path / "none.csv"], RULES, "cuda").verdict == schema.NOT_MEASURED


def test_one_bad_file_spoils_all(tmp_path: Path) -> None:
    assert _find(tmp_path, bench(), without(bench(), dist="few")).verdict == schema.NOT_MEASURED


def test_page_shows_the_table_and_what_routing_costs(tmp_path: Path) -> None:
    path, _ = write(tmp_path, bench({64: 0.8, 256: 1.1, 1024: 3.0}))
    page = threshold_page(threshold_of_files([path], RULES, "cuda"), RULES, "cuda", [str(path)])
    assert "# Threshold of `cuda`: 1024" in page
    assert "| 64 | few | 1 | 0.80x | 0.80x | 0.0002 | **no** |" in page
    assert "| 1024 | mixed | 1 | 3.00x | 3.00x | 0.0002 | yes |" in page
    assert "median speed-up of 1.10x is given up (L = 256" in page
    assert "**More than 10 % slower than packed SDPA** is possible: 0.80x at L = 64" in page


def test_page_of_a_kernel_that_is_never_much_slower(tmp_path: Path) -> None:
    path, _ = write(tmp_path, bench({64: 0.95, 256: 3.0, 1024: 3.0}))
    page = threshold_page(threshold_of_files([path], RULES, "cuda"), RULES, "cuda", [str(path)])
    assert "never more than 10 % slower" in page
    assert "nothing is given up" in page
    path, _ = write(tmp_path, bench())
    assert "routing costs nothing" in threshold_page(threshold_of_files([path], RULES, "cuda"), RULES, "cuda", ["x"])


def test_page_without_a_threshold(tmp_path: Path) -> None:
    path, _ = write(tmp_path, bench(dict.fromkeys((64, 256, 1024), 1.05)))
    page = threshold_page(threshold_of_files([path], RULES, "cuda"), RULES, "cuda", [str(path)])
    assert "# Threshold of `cuda`: FAIL" in page
    assert "With no threshold every call goes to packed SDPA" in page
    page = threshold_page(threshold_of_files([tmp_path / "no.csv"], RULES, "cuda"), RULES, "cuda", ["no.csv"])
    assert "# Threshold of `cuda`: NOT MEASURED" in page

"""The report: one page and its pictures, drawn from data that is there and silent about data that is not."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.image
import pytest

from nsa_sel.measure import schema
from nsa_sel.measure.report.page import write_report
from tests.planted import bench, cell, decode, write

PICTURES = ("speedup", "bandwidth", "share", "roofline")


def _drawn(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


def test_page_and_pictures(tmp_path: Path) -> None:
    write(tmp_path, bench({64: 1.0, 256: 2.0, 1024: 4.0}), decode({1: (0.3, 0.4, 0.5), 64: (0.4, 0.5, 0.6)}))
    page = write_report(tmp_path).read_text()
    assert "**PASS**, from L = 256 on" in page
    assert _drawn(tmp_path) == set(PICTURES)
    assert set(re.findall(r"!\[[^]]+\]\((\w+)\.png\)", page)) == set(PICTURES)
    for name in PICTURES:
        image = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert image.shape[0] > 300
        assert image.shape[1] > 600
        assert len({tuple(pixel) for pixel in image.reshape(-1, image.shape[-1])[::97]}) > 5, f"{name} is blank"
    assert "| cuda | few | 1.00x (1.00x) | 2.00x (2.00x) | 4.00x (4.00x) |" in page
    assert "| 64 | 65536 |" in page
    assert "60.0%" in page


def test_what_did_not_run_is_not_drawn(tmp_path: Path) -> None:
    write(tmp_path, cell(bench(), "ran", "sdpa", backend="cuda"))
    (tmp_path / "decode.csv").unlink()
    (tmp_path / "share.png").write_bytes(b"of an earlier report")
    page = write_report(tmp_path).read_text()
    assert "**NOT MEASURED**" in page
    assert _drawn(tmp_path) == {"bandwidth", "roofline"}  # of the baseline, which ran
    assert "| cuda |" not in page
    assert "`cuda` (graph): 9 rows did not run as named" in page
    assert page.count(schema.NOT_MEASURED + ": the data holds nothing to draw here.") == 2


def test_decode_alone(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "bench.csv").unlink()
    page = write_report(tmp_path).read_text()
    assert _drawn(tmp_path) == {"share"}
    assert "bench.csv: no such file" in page


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a bench\.csv or a decode\.csv"):
        write_report(tmp_path)

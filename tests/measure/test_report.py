"""The report: one page and its pictures, drawn from data that is there and silent about data that is not."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import pytest

from nsa_sel.measure import schema
from nsa_sel.measure.report.page import write_report
from tests.planted import alter, honest

PICTURES = ("speedup", "bandwidth", "share")


def _drawn(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


def test_page_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[list[str]] = []
    legends: list[list[str]] = []

    def kept(figure: matplotlib.figure.Figure, path: Path) -> None:
        texts.append([t.get_text() for t in figure.findobj(matplotlib.text.Text)])
        legends.append([t.get_text() for legend in figure.legends for t in legend.get_texts()])
        right(figure, path)

    right = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)
    honest(tmp_path, share=0.6)
    page = write_report(tmp_path).read_text()
    assert "**PASS**, from L = 64 on" in page
    assert _drawn(tmp_path) == set(PICTURES)
    assert set(re.findall(r"!\[[^]]+\]\((\w+)\.png\)", page)) == set(PICTURES)
    for name in PICTURES:
        image = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert image.shape[0] > 300
        assert image.shape[1] > 600
        assert len({tuple(pixel) for pixel in image.reshape(-1, image.shape[-1])[::97]}) > 5, f"{name} is blank"
    assert re.search(r"\| cuda \| few \| 3\.00x \(3\.00x\) \| 3\.00x", page)
    assert "| 2 | 4096 |" in page
    assert "60.0%" in page
    assert "| 2 | 4096 | 60.0% | 3.00x | 1.67x | 1.67x |" in page
    for found in texts:  # a picture that leaves its page still says what it is of
        assert any("NVIDIA H100 80GB HBM3, bf16, graph" in text for text in found)
    bars = [name for name in legends[2] if not name.startswith("asked")]
    assert bars == ["residual (no stage)", "gate", "window", "score", "compress", "select"]  # from top to bottom


def test_what_did_not_run_is_not_drawn(tmp_path: Path) -> None:
    honest(tmp_path)
    alter(tmp_path / "bench.csv", lambda rows, facts: [r.update(ran="sdpa") for r in rows if r["backend"] == "cuda"])
    (tmp_path / "decode.csv").unlink()
    (tmp_path / "share.png").write_bytes(b"of an earlier report")
    page = write_report(tmp_path).read_text()
    assert "**NOT MEASURED**" in page
    assert _drawn(tmp_path) == {"speedup", "bandwidth"}  # of the others, which ran
    assert "| cuda |" not in page
    assert "`cuda` (graph): 22 rows did not run as named" in page
    assert page.count(schema.NOT_MEASURED + ": the data holds nothing to draw here.") == 1


def test_decode_alone_and_nothing_at_all(tmp_path: Path) -> None:
    honest(tmp_path)
    (tmp_path / "bench.csv").unlink()
    page = write_report(tmp_path).read_text()
    assert _drawn(tmp_path) == {"share"}
    assert "no such file" in page
    (tmp_path / "decode.csv").unlink()
    with pytest.raises(ValueError, match=r"expected a bench\.csv or a decode\.csv"):
        write_report(tmp_path)

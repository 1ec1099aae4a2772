"""The benchmark of the fallback: every contestant computes the same, ours is the fallback, nothing is made up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import nsa_sel
from benchmarks import fallback

SMALL = fallback.Shape("small", G=2, h=2, Dk=16, Dv=8, n=3, block_size=16)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[fallback.Result]:
    monkeypatch.setattr(fallback, "S_KV", 128)
    return [fallback.measure(inputs, dtype, 0.0, 3) for dtype, inputs in fallback.cases((SMALL,), (1, 8))]


def test_every_case_has_every_contestant_and_a_row(results: list[fallback.Result], tmp_path: Path) -> None:
    assert [(r.dtype, r.B) for r in results] == [(dtype, B) for dtype in ("fp32", "bf16", "fp16") for B in (1, 8)]
    for r in results:
        forward = {"read", "gather", "ours", "naive", "gather_sdpa"}
        assert set(r.ms) == (forward | {"ours_grad", "naive_grad"} if r.B == 1 else forward)
        assert all(0 < least <= median <= high for least, median, high in r.ms.values())
        assert r.rounds == 3
    assert results[0].selected_bytes == 2 * 3 * 16 * (16 + 8) * 4
    text = fallback.table(results)
    assert text.count("| small |") == 6
    assert "naive / ours: geometric mean" in text
    fallback.picture(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_ratio_that_was_not_measured_is_no_number(results: list[fallback.Result]) -> None:
    assert math.isnan(results[1].ratio("naive_grad", "ours_grad"))


def test_a_contestant_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "S_KV", 128)
    monkeypatch.setitem(fallback.ATTEND, "naive", lambda x, variant: fallback.naive(x, variant) + 0.1)
    _, inputs = next(fallback.cases((SMALL,), (1,)))
    with pytest.raises(AssertionError, match="not close"):
        fallback.measure(inputs, "fp32", 0.0, 3)


def test_ours_is_the_fallback_and_the_gather_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "S_KV", 128)
    _, inputs = next(fallback.cases((SMALL,), (1,)))
    copied: list[int] = []
    select = torch.index_select
    monkeypatch.setattr(
        torch, "index_select", lambda t, dim, i, out: copied.append(out.nbytes) or select(t, dim, i, out=out)
    )
    fallback.ours_without_attention(inputs, 0)
    assert sum(copied) == 2 * 3 * 16 * (16 + 8) * 4
    assert nsa_sel.stats() == {"sdpa": {"backend='sdpa'": 1}}

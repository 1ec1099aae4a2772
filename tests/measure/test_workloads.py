"""Workloads and their inputs: one name for each shape, and selections that are what their distribution says."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nsa_sel.measure import schema
from nsa_sel.measure.run.contestants import gather, moved_bytes, selected_spans, selected_tokens
from nsa_sel.measure.run.inputs import make_blocks, make_ranges, oracle_rows, seed_of, variants_of
from nsa_sel.measure.run.workload import SUITES, Workload, WorkloadError, expand, from_options, load_suite, load_suites

CPU = torch.device("cpu")


def _spans(dist: str, length: int, rows: int = 64, s_kv: int = 4096) -> torch.Tensor:
    (workload,) = from_options({"dist": [dist], "L": [length], "rows": [rows], "G": 2, "S_kv": s_kv})
    return make_ranges(workload, torch.Generator().manual_seed(3), CPU)


def test_plan_is_the_whole_matrix() -> None:
    plan = load_suite("plan")
    expected = itertools.product(
        schema.DISTRIBUTIONS, (64, 256, 1024), (4, 8), (64, 128), (64, 128), (16, 32, 64, 128, 256, 512, 1024)
    )
    assert {(w.dist, w.rows, w.h, w.Dk, w.Dv, w.L) for w in plan} == set(expected)
    assert {(w.G, w.S, w.S_kv, w.dtype, w.page_size) for w in plan} == {(2, 1, 4096, "bf16", None)}


def test_models_are_as_published() -> None:
    shapes = {
        (w.name.rsplit("-", 1)[0], w.G, w.h, w.Dk, w.Dv, w.n, w.block_size, w.page_size, w.L)
        for w in load_suite("models")
    }
    assert shapes == {
        ("nsa-paper", 4, 16, 192, 128, 16, 64, None, 1024),
        ("minimax-m3", 4, 16, 128, 128, 16, 128, 128, 2048),
        ("infllm-v2", 2, 16, 128, 128, 64, 64, None, 4096),
        ("seerattention-r-8b", 8, 4, 128, 128, 64, 64, None, 4096),
    }
    assert {w.B for w in load_suite("models")} == {1, 4, 8, 16, 64, 256}


def test_decode_is_clamped_to_its_context() -> None:
    found = {(w.h, w.n, w.L, w.S_kv) for w in load_suite("decode")}
    assert found == {(h, n, c, c) for h in (2, 4) for n in (8, 16) for c in (128, 256, 512)}


def test_one_name_for_each_shape_over_all_suites() -> None:
    workloads = load_suites(SUITES)
    assert len({w.name for w in workloads}) == len({w.shape for w in workloads}) == len(workloads)
    with pytest.raises(WorkloadError, match="one name each"):
        load_suites(["ci", "ci"])
    grid = {"name": "a-{L}-{h}", "dist": "few", "dtype": "bf16", "rows": 2, "G": 1, "h": 4, "Dk": 64, "Dv": 64}
    twice = expand(grid | {"S_kv": 512, "L": 64}) + expand(grid | {"S_kv": 512, "L": 64, "name": "b"})
    from nsa_sel.measure.run.workload import unique

    with pytest.raises(WorkloadError, match="one shape each"):
        unique(twice)


@pytest.mark.parametrize("length", [16, 64, 1024])
def test_few_is_one_span(length: int) -> None:
    spans = _spans("few", length)
    assert spans.shape == (64, 1, 2)
    assert (spans[..., 1] - spans[..., 0] == length).all()
    assert spans.min() >= 0
    assert spans.max() <= 4096
    assert len(set(spans[:, 0, 0].tolist())) > 32


@pytest.mark.parametrize(
    ("dist", "length"), [("many", 16), ("many", 1024), ("mixed", 16), ("mixed", 17), ("mixed", 1024)]
)
def test_spans_are_disjoint_with_gaps_and_sum_to_l(dist: str, length: int) -> None:
    spans = _spans(dist, length).long()
    lengths = spans[..., 1] - spans[..., 0]
    assert (lengths.sum(dim=1) == length).all()
    assert spans.min() >= 0
    assert spans.max() <= 4096
    for row in spans.tolist():
        used = [(start, end) for start, end in row if end > start]
        assert all(following[0] > before[1] for before, following in itertools.pairwise(used))
    counts = set((lengths > 0).sum(dim=1).tolist())
    assert counts == ({8} if dist == "many" else {2, 4, 8})
    if dist == "many":
        assert (lengths == length // 8).all()
    else:
        assert len({tuple(row) for row in lengths.tolist()}) > 32


def test_spans_fill_a_cache_that_has_room_for_no_more() -> None:
    spans = _spans("many", 16, rows=8, s_kv=23).long()  # 16 tokens and 7 gaps
    assert (spans[:, 0, 0] == 0).all()
    assert (spans[:, -1, 1] == 23).all()


def test_blocks_hold_the_first_and_the_last_and_no_block_twice() -> None:
    (workload,) = from_options({"block_size": 64, "n": [8], "rows": [32], "G": 2, "S_kv": 4096})
    ids = make_blocks(workload, torch.Generator().manual_seed(0), CPU)
    for row in ids.tolist():
        assert {0, 63} <= set(row)
        assert len(set(row)) == 8
    assert any(row != sorted(row) for row in ids.tolist())


def test_blocks_beyond_the_context_are_unused_slots() -> None:
    (workload,) = [w for w in load_suite("decode") if w.name == "decode-h2-n16-L128-r64"]
    ids = make_blocks(workload, torch.Generator().manual_seed(0), CPU)
    assert {tuple(sorted(row)) for row in ids.tolist()} == {(-1,) * 14 + (0, 1)}


@pytest.mark.parametrize("name", ["ci-few-L128", "ci-many-L32", "ci-mixed-L128", "ci-paged-blocks"])
def test_gather_and_bytes_are_counted_in_the_selection(name: str) -> None:
    (workload,) = [w for w in load_suite("ci") if w.name == name]
    inputs = variants_of(workload, 0, CPU, 0, 1 << 30)[0]
    k, v = gather(inputs)
    assert k.shape == (workload.rows, workload.L, workload.Dk)
    assert v.shape == (workload.rows, workload.L, workload.Dv)
    tokens = selected_tokens(inputs)
    row, at = workload.rows - 1, workload.L // 2
    token = int(tokens[row, at])
    b, g = row // workload.G, row % workload.G
    if inputs.block_table is None:
        expected = inputs.k[b, g, token]
    else:
        assert workload.page_size is not None
        expected = inputs.k[int(inputs.block_table[b, token // workload.page_size]), g, token % workload.page_size]
    assert torch.equal(k[row, at], expected)
    spans = selected_spans(inputs)[row].tolist()
    assert sorted(tokens[row].tolist()) == sorted(t for start, end in spans for t in range(start, end))
    assert moved_bytes(inputs) == workload.call_bytes


def test_inputs_follow_from_shape_and_seed_alone() -> None:
    (one,) = from_options({"L": [64], "dist": ["mixed"], "rows": [8], "G": 2, "S_kv": 512})
    other = Workload(**{**one.__dict__, "name": "another name"})
    first, again = (variants_of(w, 5, CPU, 0, 1 << 30)[1] for w in (one, other))
    for name in ("q", "k", "v", "ranges"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert seed_of(one, 5) != seed_of(one, 6)
    assert oracle_rows(one, 5) == oracle_rows(other, 5)


def test_variants_are_cold_as_far_as_memory_allows() -> None:
    (workload,) = from_options({"L": [64], "dist": ["few"], "rows": [8], "G": 2, "S_kv": 512})
    several = variants_of(workload, 0, CPU, 5 * workload.call_bytes, 100 * workload.cache_bytes)
    assert len(several) == 6  # five calls' worth, and an even number for two streams
    assert len({inputs.k.data_ptr() for inputs in several}) == 6
    shared = variants_of(workload, 0, CPU, 5 * workload.call_bytes, 2 * workload.cache_bytes)
    assert len({inputs.k.data_ptr() for inputs in shared}) == 2
    selections = {tuple(inputs.ranges.flatten().tolist()) for inputs in shared if inputs.ranges is not None}
    assert len(selections) == 6
    assert len(variants_of(workload, 0, CPU, 10**12, 1)) == 8


def test_oracle_rows_are_at_most_64_and_in_range() -> None:
    (workload,) = from_options({"rows": [1024], "dist": ["few"], "G": 2, "S_kv": 4096})
    rows = oracle_rows(workload, 0)
    assert len(set(rows)) == 64
    assert all(0 <= b < 512 and s == 0 and 0 <= g < 2 for b, s, g in rows)
    (small,) = from_options({"rows": [6], "dist": ["few"], "G": 2, "S_kv": 4096})
    assert oracle_rows(small, 0) == [(b, 0, g) for b in range(3) for g in range(2)]


def test_arguments_make_the_workload_again() -> None:

    (workload,) = from_options({"rows": [8], "G": 2, "dist": ["blocks"], "block_size": 64, "n": [4], "S_kv": 512})
    text = workload.arguments()
    for part in ("--rows 8", "--G 2", "--n 4", "--block-size 64", "--S-kv 512", "--dist blocks", "--dtype bf16"):
        assert part in text


BAD = {
    "L above S_kv": ({"L": 8192}, "L at most S_kv"),
    "many not a multiple": ({"dist": "many", "L": 20}, "multiple of 8"),
    "mixed too short": ({"dist": "mixed", "L": 4}, "at least 8"),
    "no room for gaps": ({"dist": "many", "L": 4096}, "room for 7 gaps"),
    "unknown dist": ({"dist": "all"}, "dist few, many"),
    "unknown dtype": ({"dtype": "int8"}, "dtype bf16"),
    "rows and B": ({"B": 2}, "expected B, or rows"),
    "rows off G": ({"rows": 7}, "multiple of S x G = 2"),
    "zero": ({"h": 0}, "h as a whole number above 0"),
    "text": ({"h": "4"}, "h as a whole number above 0"),
    "unknown letter": ({"heads": 4}, "got heads"),
    "blocks without a size": ({"dist": "blocks"}, "block_size with dist blocks"),
    "wrong slots": ({"n": 3}, "n = 1 for dist few"),
    "more queries": ({"S": 2, "rows": 8}, "S = 1"),
    "pages that do not fit": ({"page_size": 100}, "multiple of page_size"),
    "unknown brace": ({"name": "w-{M}"}, "letters in braces"),
}


@pytest.mark.parametrize("case", BAD)
def test_workloads_that_cannot_be(case: str) -> None:
    change, message = BAD[case]
    grid = {"dist": "few", "dtype": "bf16", "rows": 8, "G": 2, "h": 4, "Dk": 64, "Dv": 64, "S_kv": 4096, "L": 64}
    with pytest.raises(WorkloadError, match=message):
        expand(grid | change)


def test_suites_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    for text, message in (("[[workload", "expected TOML"), ("a = 1", "tables alone"), ("workload = 3", "tables alone")):
        path.write_text(text)
        with pytest.raises(WorkloadError, match=message):
            load_suite(path)
    with pytest.raises(WorkloadError, match="plan, decode, models, ci"):
        load_suite("plans")

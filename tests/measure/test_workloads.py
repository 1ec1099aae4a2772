"""Workloads and their inputs: one name for each shape, and selections that are what their distribution says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_sel.measure import schema
from nsa_sel.measure.run.contestants import gather_index, moved_bytes, selected_spans, selected_tokens
from nsa_sel.measure.run.inputs import make_blocks, make_ranges, oracle_rows, seed_of, variants_of
from nsa_sel.measure.run.workload import (
    SUITES,
    Workload,
    WorkloadError,
    expand,
    from_options,
    load_suite,
    load_suites,
    unique,
)

CPU = torch.device("cpu")
BLOCKS = {"dist": ["blocks"], "block_size": 64, "n": [8]}


def one(**options: Any) -> Workload:
    (found,) = from_options({"rows": [64], "dist": ["few"], "G": 2, "S_kv": 4096} | options)
    return found


def test_suites_are_as_published() -> None:
    plan = {(w.dist, w.rows, w.h, w.Dk, w.Dv, w.L, w.G, w.S, w.S_kv, w.dtype, w.page_size) for w in load_suite("plan")}
    lengths, fixed = (16, 32, 64, 128, 256, 512, 1024), (2, 1, 4096, "bf16", None)
    matrix = itertools.product(schema.DISTRIBUTIONS, (64, 256, 1024), (4, 8), (64, 128), (64, 128), lengths)
    assert plan == {(*shape, *fixed) for shape in matrix}
    models = load_suite("models")
    letters = ("G", "h", "Dk", "Dv", "n", "block_size", "page_size", "L")
    assert {(w.name.rsplit("-", 1)[0], *(getattr(w, x) for x in letters)) for w in models} == {
        ("nsa-paper", 4, 16, 192, 128, 16, 64, None, 1024),
        ("minimax-m3", 4, 16, 128, 128, 16, 128, 128, 2048),
        ("infllm-v2", 2, 16, 128, 128, 64, 64, None, 4096),
        ("seerattention-r-8b", 8, 4, 128, 128, 64, 64, None, 4096),
    }
    assert {w.B for w in models} == {1, 4, 8, 16, 64, 256}
    decode = {(w.h, w.n, w.L, w.S_kv) for w in load_suite("decode")}  # clamped to its context
    assert decode == {(h, n, c, c) for h in (2, 4) for n in (8, 16) for c in (128, 256, 512)}


def test_one_name_for_each_shape_over_all_suites() -> None:
    workloads = load_suites(SUITES)
    assert len({w.name for w in workloads}) == len({w.shape for w in workloads}) == len(workloads)
    with pytest.raises(WorkloadError, match="one name each"):
        load_suites(["ci", "ci"])
    with pytest.raises(WorkloadError, match="one shape each"):
        unique([one(), replace(one(), name="another")])


@pytest.mark.parametrize(
    ("dist", "length", "slots"),
    [("few", 16, {1}), ("few", 1024, {1}), ("many", 16, {8}), ("many", 1024, {8}), ("mixed", 16, {2, 4, 8}),
     ("mixed", 17, {2, 4, 8}), ("mixed", 1024, {2, 4, 8})],
)  # fmt: skip
def test_spans_are_disjoint_with_gaps_and_sum_to_l(dist: str, length: int, slots: set[int]) -> None:
    spans = make_ranges(one(dist=[dist], L=[length]), torch.Generator().manual_seed(3), CPU).long()
    lengths = spans[..., 1] - spans[..., 0]
    assert (lengths.sum(dim=1) == length).all()
    assert 0 <= spans.min() <= spans.max() <= 4096
    for row in spans.tolist():
        used = [(start, end) for start, end in row if end > start]
        assert all(following[0] > before[1] for before, following in itertools.pairwise(used))
    assert set((lengths > 0).sum(dim=1).tolist()) == slots
    assert dist != "many" or (lengths == length // 8).all()
    assert len({str(row) for row in spans.tolist()}) > 32


def test_spans_fill_a_cache_that_has_room_for_no_more() -> None:
    spans = make_ranges(one(dist=["many"], L=[16], rows=[8], S_kv=23), torch.Generator(), CPU)  # 16 tokens and 7 gaps
    assert (spans[:, 0, 0] == 0).all()
    assert (spans[:, -1, 1] == 23).all()


def test_blocks_hold_the_first_and_the_last_and_no_block_twice() -> None:
    ids = make_blocks(one(**BLOCKS), torch.Generator().manual_seed(0), CPU).tolist()
    assert all({0, 63} <= set(row) and len(set(row)) == 8 for row in ids)
    assert any(row != sorted(row) for row in ids)
    (short,) = [w for w in load_suite("decode") if w.name == "decode-h2-n16-L128-r64"]
    ids = make_blocks(short, torch.Generator().manual_seed(0), CPU).tolist()
    assert {tuple(sorted(row)) for row in ids} == {(-1,) * 14 + (0, 1)}  # beyond the context: unused slots


@pytest.mark.parametrize("name", ["ci-few-L128", "ci-many-L32", "ci-mixed-L128", "ci-paged-blocks"])
def test_index_and_bytes_are_those_of_the_selection(name: str) -> None:
    (workload,) = [w for w in load_suite("ci") if w.name == name]
    inputs = variants_of(workload, 0, CPU, 0, 1 << 30)[0]
    k, tokens = inputs.k[gather_index(inputs)], selected_tokens(inputs)
    assert k.shape == (workload.rows, workload.L, workload.Dk)
    row, at = workload.rows - 1, workload.L // 2
    b, g, token = row // workload.G, row % workload.G, int(tokens[row, at])
    if inputs.block_table is None:
        expected = inputs.k[b, g, token]
    else:
        assert workload.page_size is not None
        expected = inputs.k[int(inputs.block_table[b, token // workload.page_size]), g, token % workload.page_size]
    assert torch.equal(k[row, at], expected)
    spans = selected_spans(inputs)[row].tolist()
    assert tokens[row].tolist() == sorted(t for start, end in spans for t in range(start, end))
    assert moved_bytes(inputs) == workload.call_bytes


def test_inputs_follow_from_shape_and_seed_alone() -> None:
    workload = one(L=[64], dist=["mixed"], rows=[8], S_kv=512)
    other = replace(workload, name="another name")
    first, again = (variants_of(w, 5, CPU, 0, 1 << 30)[1] for w in (workload, other))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("q", "k", "v", "ranges"))
    assert seed_of(workload, 5) != seed_of(workload, 6)
    assert oracle_rows(workload, 5) == oracle_rows(other, 5)


def test_variants_are_cold_as_far_as_memory_allows() -> None:
    workload = one(L=[64], rows=[8], S_kv=512)
    several = variants_of(workload, 0, CPU, 5 * workload.call_bytes, 100 * workload.cache_bytes)
    assert len(several) == 6  # five calls' worth, and an even number for two streams
    assert len({inputs.k.data_ptr() for inputs in several}) == 6
    shared = variants_of(workload, 0, CPU, 5 * workload.call_bytes, 2 * workload.cache_bytes)
    assert len({inputs.k.data_ptr() for inputs in shared}) == 2
    assert len({str(inputs.ranges) for inputs in shared}) == 6
    assert len(variants_of(workload, 0, CPU, 10**12, 1)) == 8


def test_oracle_rows_are_at_most_64_and_in_range() -> None:
    rows = oracle_rows(one(rows=[1024]), 0)
    assert len(set(rows)) == 64
    assert all(0 <= b < 512 and s == 0 and 0 <= g < 2 for b, s, g in rows)
    assert oracle_rows(one(rows=[6]), 0) == [(b, 0, g) for b in range(3) for g in range(2)]


def test_arguments_make_the_workload_again() -> None:
    assert one(**BLOCKS, rows=[8], S_kv=512, page_size=64).arguments() == (
        "--rows 8 --G 2 --h 4 --D 128 --Dv 128 --S-kv 512 --n 8 --block-size 64 --page-size 64 --dist blocks "
        "--dtype bf16"
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"L": 8192}, "L at most S_kv"),
    ({"dist": "many", "L": 20}, "multiple of 8"),
    ({"dist": "mixed", "L": 4}, "at least 8"),
    ({"dist": "many", "L": 4096}, "room for 7 gaps"),
    ({"dist": "all"}, "dist few, many"),
    ({"dtype": "int8"}, "dtype bf16, fp16.* got few and int8"),
    ({"B": 2}, "expected B, or rows"),
    ({"rows": 7}, "multiple of S x G = 2"),
    ({"h": 0}, "h as a whole number above 0"),
    ({"h": "4"}, "h as a whole number above 0"),
    ({"heads": 4}, "got heads"),
    ({"dist": "blocks", "block_size": 64}, "expected the whole shape.* 'n'"),
    ({"dist": "blocks"}, "block_size with dist blocks"),
    ({"n": 3}, "n = 1 for dist few"),
    ({"S": 2, "rows": 8}, "S = 1"),
    ({"page_size": 100}, "multiple of page_size"),
    ({"name": "w-{M}"}, "letters in the name's braces"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_workloads_that_cannot_be(change: dict[str, Any], message: str) -> None:
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

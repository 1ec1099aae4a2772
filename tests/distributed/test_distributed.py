"""A cache spread over gloo processes: the reference's results, the same bits everywhere, errors and not silence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel import distributed
from nsa_sel.testing import assert_matches_reference, selection_attention_reference
from tests.cases import CASES, case
from tests.distributed import work
from tests.distributed.ranks import run_ranks

WORLDS = (2, 4)
_FP64 = 1e-6  # lse is fp32 by contract, and the parts are weighed by it


Reports = Callable[[int, str], list[Any]]  # (world, name of the work) -> what each rank reports


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    @functools.cache
    def of_world(world: int) -> list[dict[str, Any]]:
        return run_ranks(work.together, world, tmp_path_factory.mktemp("ranks"))

    return lambda world, name: [report[name] for report in of_world(world)]


@pytest.mark.parametrize("world", WORLDS)
def test_every_case_matches_the_reference_with_the_same_bits_on_every_rank(world: int, reports: Reports) -> None:
    first, *others = reports(world, "every_case")
    assert len(first) == 2 * sum(not case.heavy for case in CASES)
    for (name, interleave), (out, lse) in first.items():
        inputs = case(name).inputs()
        if out.dtype == torch.float64:
            expected, expected_lse = selection_attention_reference(**inputs.arguments())
            torch.testing.assert_close(out, expected, rtol=0, atol=_FP64)
            torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)
        else:
            assert_matches_reference(out, lse, inputs)
        for other in others:
            assert all(map(torch.equal, other[name, interleave], (out, lse))), (name, interleave)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_hold_nothing_of_a_selection_change_no_bit(world: int, reports: Reports) -> None:
    results = reports(world, "every_case")[0]
    for name in ("one-token", "one-cached-token"):  # all of a row on one rank
        expected = nsa_sel.selection_attention(**case(name).inputs().arguments(return_lse=True))
        assert all(map(torch.equal, results[name, None], expected))
    out, lse = results["all-empty", None]
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("world", WORLDS)
def test_shares_of_the_heads_are_those_of_the_whole(world: int, reports: Reports) -> None:
    results = reports(world, "shares_of_heads")
    for name in work.SHARDED:
        (out, lse), _ = results[0][name]
        B, S, G, h, Dv = out.shape
        share = (G // world, h) if G >= world else (1, G * h // world)
        shares = [result[name][1] for result in results]
        assert all(part.shape == (B, S, *share, Dv) for part, _ in shares)
        assert torch.equal(torch.cat([part.flatten(2, 3) for part, _ in shares], 2), out.flatten(2, 3))
        assert torch.equal(torch.cat([part.flatten(2) for _, part in shares], 2), lse.flatten(2))


def test_sharded_groups_send_nothing(reports: Reports) -> None:
    parts = reports(2, "groups_sharded")
    out, lse = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
    assert_matches_reference(out, lse, case("many-rows").inputs())


def test_groups_and_tokens_sharded_at_once(reports: Reports) -> None:
    parts = reports(4, "two_by_two")
    for one, same in ((0, 1), (2, 3)):
        assert all(map(torch.equal, parts[one], parts[same]))
    out, lse = (torch.cat([parts[0][i], parts[2][i]], dim=2) for i in (0, 1))
    assert_matches_reference(out, lse, case("many-rows").inputs())


@pytest.mark.parametrize("world", WORLDS)
def test_one_message_of_the_size_that_the_page_says(world: int, reports: Reports) -> None:
    chosen = case("many-rows")
    heads = chosen.B * chosen.S * chosen.G * chosen.h
    told = 16  # bytes beside the formula, on CPU tensors alone: the length of the cache and of a run
    for report in reports(world, "messages"):
        assert report == {
            "all_gather": [heads * (chosen.Dv * 2 + 4) + told],
            "all_to_all": [heads * (chosen.Dv * 2 + 4) + world * told],  # of which 1 / world stays on the rank
        }


def test_what_cannot_be_right_is_refused_on_every_rank(reports: Reports) -> None:
    interleave = "interleave: expected None or a divisor >= 1 of the 128 tokens of each rank's cache, got"
    expected = {
        "zero interleave": f"ArgumentError: {interleave} 0",
        "no divisor": f"ArgumentError: {interleave} 48",
        "no integer": f"ArgumentTypeError: {interleave} 2.0",
        "gradients": "AutogradError: q, k, v: expected no gradients to be required",
        "heads": "ArgumentError: shard_heads: expected G a multiple of the group's 2 ranks, or 2 a multiple of G and h",
        "dtype": "ArgumentTypeError: k: expected bfloat16 or float8_e4m3fn [B=1, G=2, S_kv, Dk=64], got float32",
        "other runs": "ArgumentError: interleave: expected equally many tokens per run on each rank, got [16, 32]",
        "other caches": "ArgumentError: k: expected equally many tokens in each rank's cache, got [128, 192]",
    }
    for report in reports(2, "refusals"):
        assert set(report) == set(expected)
        for name, text in expected.items():
            assert report[name].startswith(text), report[name]


def test_one_graph_without_breaks_gives_the_same_bits(reports: Reports) -> None:
    for pairs in reports(2, "compiled"):
        for eager, traced in pairs:
            assert all(map(torch.equal, eager, traced))


def test_no_value_is_read_back_on_a_gpu(reports: Reports) -> None:
    chosen = case("pages-blocks")
    for shapes in reports(2, "unseen"):
        assert shapes[0] == (chosen.B, chosen.S, chosen.G, chosen.h, chosen.Dv)
        assert shapes[1] == (chosen.B, chosen.S, chosen.G // 2, chosen.h, chosen.Dv)


def test_without_a_group_there_is_an_error() -> None:
    with pytest.raises(nsa_sel.BackendError, match="init_process_group"):
        distributed.selection_attention(**case("h4").inputs().arguments())


def test_a_lost_rank_gives_the_others_an_error_within_the_timeout(tmp_path: Path) -> None:
    told_by = run_ranks(work.one_rank_is_lost, 4, tmp_path)
    assert told_by[1] is None  # killed
    for rank in (0, 2, 3):
        assert set(told_by[rank]) == {"absent", "killed"}
        for error, seconds in told_by[rank].values():
            assert "Error: " in error
            assert seconds < work.LOST_TIMEOUT + 5  # on a busy machine

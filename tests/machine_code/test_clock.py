"""The clock's stages keep to their budgets, its output to its form. Clocks of a model: exact, the same everywhere."""

from __future__ import annotations

import json

import pytest
import torch

from tests.machine_code import __main__ as command
from tests.machine_code import bandwidth, clock, selection_attention
from tests.machine_code.native import Model

# Clocks at most, by the model; a change of the kernel that costs more has to say why it is worth it.
BUDGETS = {
    "sm_90": {
        "first_byte": 2000, "map_32": 225, "map_32_paged": 380, "load_tile": 320, "key_tile": 420, "value_tile": 405,
        "begin_item": 110, "softmax": 920, "merge_cluster": 980, "combine": 1160, "chain_b1": 10800,
    },
    "sm_80": {
        "first_byte": 2000, "map_32": 225, "map_32_paged": 360, "load_tile": 330, "key_tile": 495, "value_tile": 740,
        "begin_item": 215, "softmax": 905, "merge_cluster": 1090, "combine": 1090, "chain_b1": 11200,
    },
}  # fmt: skip


def test_every_stage_keeps_to_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--json"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model")
    figures = json.loads(lines[-1])
    assert list(figures) == ["sm_90", "sm_80"]
    for arch, budgets in BUDGETS.items():
        assert list(figures[arch]) == list(clock.KEYS)
        over = {name: (value, budgets[name]) for name, value in figures[arch].items() if not 0 < value <= budgets[name]}
        assert not over, f"{arch}: clocks over their budget (got, allowed): {over}"


def test_what_the_model_assumes_moves_what_it_should() -> None:
    warm, cold = (clock.Problem(model=Model(cold=c)).run() for c in (0, 2))
    # One trip to DRAM instead of L2, 720 clocks, of which the start of the block hides some.
    assert 500 <= cold.decode.marks["copy of k"] - warm.decode.marks["copy of k"] <= 720
    slow = clock.Problem(model=Model(bytes_per_clock=5)).run()
    assert slow.clocks > 1024 * 640 / 5  # a row's bytes over the link
    assert slow.counts == warm.counts


def test_more_requests_reach_a_larger_share_of_the_bandwidth() -> None:
    shares = [bandwidth.share(bandwidth.SHAPES[0], B, bandwidth.H200) for B in (1, 8, 64)]
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def first_key(n: int, l2: int) -> float:
    """Return when the first byte of K is asked for, of a row that selects n blocks of 4 tokens."""
    q, k, v = (torch.ones(1, 1, *shape).bfloat16() for shape in ((1, 16, 192), (8 * n, 192), (8 * n, 128)))
    ids = torch.arange(0, 2 * n, 2, dtype=torch.int32).view(1, 1, 1, n)
    run = selection_attention(q, k, v, block_indices=ids, block_size=4, num_splits=1, model=Model(l2=l2), clusters=1)
    return run.decode.marks["copy of k"]


def test_counting_takes_one_trip_to_memory_for_1024_slots() -> None:
    trips = {n: (first_key(n, 1280) - first_key(n, 280)) / 1000 for n in (32, 1024, 2048, 4096)}
    assert trips[32] <= 1
    assert trips[1024] <= 3  # the row's lengths and first spans, all spans, the second 32 spans
    assert trips[2048] - trips[1024] == pytest.approx(1, abs=0.1)
    assert trips[4096] - trips[1024] == pytest.approx(3, abs=0.1)

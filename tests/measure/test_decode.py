"""The decode step: it computes NSA's attention, and its stages account for its time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_sel
from nsa_sel.backends import sdpa
from nsa_sel.measure.run import decode
from nsa_sel.measure.run.clock import quantiles
from nsa_sel.measure.run.decode import StepTimes, context_tokens, facts_of, rows_of, time_steps
from nsa_sel.measure.run.decode_step import DecodeStep, Shape
from nsa_sel.measure.schema import DECODE_COLUMNS, STAGES

CPU = torch.device("cpu")


class Steps:
    """Steps whose stages take a known time by a clock of their own, on a machine with other processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped: Callable[[int], float] = lambda at: 0.0) -> None:
        self.now = self.computed = 0.0
        self.stopped, self.taken = stopped, 0
        monkeypatch.setattr(decode.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(decode.time, "thread_time", lambda: self.computed)

    def step(self, *leave_out: str) -> DecodeStep:
        step = DecodeStep(1, 256, "sdpa", CPU, leave_out=leave_out)
        for name, ms in MS.items():
            setattr(step, f"_{name}", functools.partial(self._take, ms))
        return step

    def timed(self, *leave_out: str) -> StepTimes:
        return time_step(self.step(*leave_out), iters=3)

    def _take(self, ms: float) -> None:
        self.taken += 1
        self.computed += ms / 1e3
        self.now += (ms + self.stopped(self.taken)) / 1e3


MS = {"append": 0.5, "compress": 4.0, "score": 1.0, "select": 6.0, "window": 2.0, "gate": 1.5}


def time_step(step: DecodeStep, iters: int = 2, warmup: int = 0) -> StepTimes:
    return time_steps([step], "eager", CPU, iters, warmup)[0][0]


@pytest.mark.parametrize(
    "stopped",
    [lambda at: 0.0, lambda at: 40.0 if at % 20 < 6 else 0.0, lambda at: 9.0 if at % 13 == 0 else 0.0],
    ids=["alone", "others take whole steps", "others take a stage now and then"],
)
def test_stages_add_up_to_the_step_whatever_else_the_machine_does(
    monkeypatch: pytest.MonkeyPatch, stopped: Callable[[int], float]
) -> None:
    times = Steps(monkeypatch, stopped).timed()
    assert {stage: quantiles(ms)[0] for stage, ms in times.stages.items()} == pytest.approx({s: MS[s] for s in STAGES})
    assert quantiles(times.step)[0] == pytest.approx(15.0)
    assert times.residual == pytest.approx(0.5 / 15)  # the append, which is part of the step and of no stage


def test_leaving_the_selection_out_changes_its_stage_and_the_step_by_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    full, without = steps.timed(), steps.timed("select")
    assert without.stages["select"] == [0.0] * 3
    assert quantiles(full.step)[0] - quantiles(without.step)[0] == pytest.approx(MS["select"])
    assert all(without.stages[stage] == pytest.approx(full.stages[stage]) for stage in STAGES if stage != "select")


def test_a_sample_ends_also_where_every_step_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Steps(monkeypatch, lambda at: 5.0).timed().step) == 3


def test_what_ran_is_proven_and_a_stage_left_out_did_not_run() -> None:
    step = DecodeStep(2, 1024, "sdpa", CPU)
    nsa_sel.reset_stats()
    times = time_step(step)
    assert times.ran == "sdpa"
    assert sum(nsa_sel.stats()["sdpa"].values()) == step.select_calls > 4
    rows = rows_of([step], [times], CPU)
    assert [row["stage"] for row in rows] == [*STAGES, "step"]
    assert all(tuple(row) == DECODE_COLUMNS for row in rows)
    assert {(row["backend"], row["ran"]) for row in rows if row["stage"] == "select"} == {("sdpa", "sdpa")}
    assert {(row["backend"], row["ran"]) for row in rows if row["stage"] not in ("select", "step")} == {
        ("torch", "torch")
    }
    left = DecodeStep(1, 1024, "sdpa", CPU, leave_out=("select", "gate"))
    ran = {row["stage"]: row["ran"] for row in rows_of([left], [time_step(left, iters=1)], CPU)}
    assert ran == {"compress": "torch", "score": "torch", "select": "", "window": "torch", "gate": "", "step": ""}


def test_a_backend_that_cannot_run_raises_instead_of_falling_back() -> None:
    with pytest.raises(RuntimeError, match="cuda"):
        time_step(DecodeStep(1, 1024, "cuda", CPU))


def test_shares_are_of_the_step_and_not_normalised() -> None:
    times = StepTimes({stage: [1.0, 2.0, 3.0] for stage in STAGES}, [16.0, 20.0, 90.0], "sdpa")
    assert times.shares == dict.fromkeys(STAGES, 0.1)
    assert times.residual == pytest.approx(0.5)


def test_bytes_are_counted_where_they_are_read() -> None:
    step = DecodeStep(2, 4096, "sdpa", CPU)
    before = sdpa.counters().gathered_bytes
    reads = step.count_reads()
    rows, element = 2 * 4, 2
    assert reads["select"] == sdpa.counters().gathered_bytes - before  # the backend counts its gather by itself
    assert reads["select"] == rows * 16 * 64 * (192 + 128) * element
    assert reads["window"] == rows * 512 * (192 + 128) * element
    assert reads["compress"] == rows * ((4096 - 32) // 16 + 1 + 32) * (192 + 128) * element
    assert step.reads is None
    step.ids[:] = torch.tensor([0, 1, 63] + [-1] * 13, dtype=torch.int32)
    assert step.selected_tokens() == rows * 3 * 64
    left = DecodeStep(1, 4096, "sdpa", CPU, leave_out=("select",))
    assert left.count_reads()["select"] == 0


def test_tokens_read_are_those_of_the_paper() -> None:
    step = DecodeStep(1, 8192, "sdpa", CPU)
    step.run()
    counted = step.k_cmp.shape[2] + step.selected_tokens() / 4 + step.k_win.shape[2]
    assert context_tokens(8192) == 2048  # table 4
    assert counted == 2048 - 1  # the last compressed token of 8,192 / 16 would reach beyond the context
    facts = facts_of([step], [StepTimes({stage: [1.0] for stage in STAGES}, [5.0], "sdpa")])
    assert facts["tokens_read_per_group"]["all"] == counted
    assert facts["tokens_by_the_paper"] == 2048


def test_first_and_local_blocks_are_always_selected_and_the_rest_by_score() -> None:
    context, loud = 4096, 20
    step = DecodeStep(1, context, "sdpa", CPU)
    # Every query looks for what the compressed tokens of one block hold, so that block must be among the selected.
    step.k_cmp[:, :, loud * 4 : loud * 4 + 4] = 3 * step.q[:, :, :1]
    step.q[:] = step.q[:, :, :1]
    step.run()
    for ids in step.ids[0, 0].tolist():
        assert len(set(ids)) == 16
        assert {0, 62, 63, loud} <= set(ids)


def test_scores_of_blocks_weigh_compressed_tokens_by_their_overlap() -> None:
    step = DecodeStep(1, 2048, "sdpa", CPU)
    shape = Shape()
    count = shape.compressed(2048)
    step.p_cmp = torch.rand(1, 4, 16, count)
    step._score()
    # By brute force: a compressed token's probability is spread over its 32 tokens; a block's score is its part.
    mass = torch.zeros(4, 2048)
    for token in range(count):
        mass[:, token * 16 : token * 16 + 32] += step.p_cmp[0].sum(dim=1)[:, token : token + 1]
    score = mass.view(4, 32, 64).sum(dim=-1)
    score[:, [0, 30, 31]] = float("inf")
    expected = score.topk(16, dim=-1).indices
    assert [set(ids) for ids in step.ids[0, 0].tolist()] == [set(ids) for ids in expected.tolist()]


def test_output_is_the_gated_sum_of_three_attentions() -> None:
    step = DecodeStep(1, 512, "sdpa", CPU)  # dense: selection and window hold every token
    out = step.run()
    gates = torch.sigmoid(step.gate_logits.float())
    q = step.q.float()

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.float().transpose(-1, -2) * 192**-0.5, dim=-1) @ v.float()

    parts = [(step.k_cmp, step.v_cmp), (step.k_sel, step.v_sel), (step.k_win, step.v_win)]
    expected = sum(gates[:, :, branch] * attend(k, v) for branch, (k, v) in enumerate(parts))
    assert isinstance(expected, torch.Tensor)
    assert (out.float() - expected).abs().max() < 0.03


def test_step_appends_this_steps_token_to_every_branch() -> None:
    step = DecodeStep(1, 1024, "sdpa", CPU)
    step.run()
    for branch, cache in enumerate((step.raw, step.sel, step.win)):
        assert torch.equal(cache[:, :, -1], step.new[:, :, branch])
    expected = (step.k_raw + step.position[:, :192]).float().mean(dim=2)
    assert torch.allclose(step.k_cmp[:, :, -1].float(), expected, atol=0.02)


@pytest.mark.parametrize("context", [48, 100, 128, 1000, 1024, 1100])
def test_short_and_odd_contexts(context: int) -> None:
    step = DecodeStep(2, context, "sdpa", CPU)
    assert torch.isfinite(step.run().float()).all()
    assert step.selected_tokens() == 2 * 4 * min(context, 1024 - (-context % 64 if context > 1024 else 0))


def test_share_is_measured_before_the_kernel_and_the_step_with_it_in_the_same_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for a kernel: the selection under another name, three times as fast."""
    steps = Steps(monkeypatch)
    step = steps.step()
    fast = step.with_backend("cuda")
    fast._select = functools.partial(steps._take, 2.0)  # type: ignore[method-assign]
    times, _ = time_steps([step, fast], "eager", CPU, iters=3, warmup=1)
    rows = rows_of([step, fast], times, CPU)
    found = {(row["stage"], row["backend"]): row for row in rows}
    assert list(found) == [*((s, "sdpa" if s == "select" else "torch") for s in STAGES), ("step", "sdpa"),
                           ("select", "cuda"), ("step", "cuda")]  # fmt: skip
    assert [row["ran"] for row in rows[-2:]] == ["", ""]  # nothing was counted for it
    assert float(found["select", "sdpa"]["share"]) == pytest.approx(6 / 15, rel=1e-5)
    assert float(found["select", "cuda"]["share"]) == pytest.approx(2 / 11, rel=1e-5)
    assert facts_of([step, fast], times)["speedup of cuda"] == pytest.approx(
        {"select": 3.0, "step": 15 / 11, "expected": 15 / 11}
    )


def test_stages_are_a_handful_of_operators() -> None:
    """The selection's share must not shrink because the other stages are written badly."""
    step = DecodeStep(1, 4096, "sdpa", CPU)
    limits = {"_append": 3, "_compress": 8, "_score": 5, "_gate": 4}  # the window is one fused attention
    views = ("view", "slice", "select", "transpose", "expand", "as_strided", "detach", "split", "squeeze", "alias",
             "t.", "permute", "empty")  # fmt: skip

    class Count(TorchDispatchMode):
        seen: list[str]

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not any(part in str(function) for part in views):
                self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for name, limit in limits.items():
        mode = Count()
        mode.seen = []
        with mode:
            getattr(step, name)()
        assert len(mode.seen) <= limit, mode.seen

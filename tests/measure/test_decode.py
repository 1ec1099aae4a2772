"""The decode step: it computes NSA's attention, and its stages account for its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_sel
from nsa_sel.backends import sdpa
from nsa_sel.measure.run.clock import quantiles
from nsa_sel.measure.run.decode import StepTimes, context_tokens, facts_of, rows_of, time_step, time_steps
from nsa_sel.measure.run.decode_step import DecodeStep, Shape
from nsa_sel.measure.schema import DECODE_COLUMNS, STAGES

CPU = torch.device("cpu")


def _time(leave_out: tuple[str, ...] = (), context: int = 2048) -> StepTimes:
    step = DecodeStep(1, context, "sdpa", CPU, leave_out=leave_out)
    return time_step(step, "eager", CPU, iters=15, warmup=2)


def _holds_once(check: Callable[[], bool], attempts: int = 3) -> bool:
    """Return whether a check of times holds once: another process can spoil one run, a wrong stage spoils all."""
    return any(check() for _ in range(attempts))


def test_stages_add_up_to_the_step() -> None:
    assert _holds_once(lambda: abs(_time().residual) <= 0.05)


def test_leaving_the_selection_out_changes_its_stage_and_the_step() -> None:
    def check() -> bool:
        full, without = _time(), _time(("select",))
        select = quantiles(full.stages["select"])[0]
        saved = quantiles(full.step)[0] - quantiles(without.step)[0]
        gone = quantiles(without.stages["select"])[0] < 0.05 * select
        return gone and abs(saved / select - 1) < 0.25 and abs(without.residual) <= 0.05

    assert _holds_once(check)


def test_what_ran_is_proven_and_a_stage_left_out_did_not_run() -> None:
    step = DecodeStep(2, 1024, "sdpa", CPU)
    nsa_sel.reset_stats()
    times = time_step(step, "eager", CPU, iters=2, warmup=0)
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
    ran = {row["stage"]: row["ran"] for row in rows_of([left], [time_step(left, "eager", CPU, 1, 0)], CPU)}
    assert ran == {"compress": "torch", "score": "torch", "select": "", "window": "torch", "gate": "", "step": ""}


def test_a_backend_that_cannot_run_raises_instead_of_falling_back() -> None:
    with pytest.raises(RuntimeError, match="cuda"):
        time_step(DecodeStep(1, 1024, "cuda", CPU), "eager", CPU, 1, 0)


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


def test_share_is_measured_before_the_kernel_and_the_step_with_it_in_the_same_run() -> None:
    """A stand-in for a kernel: the selection under another name that takes no time."""
    step = DecodeStep(1, 2048, "sdpa", CPU)
    fast = step.with_backend("sdpa")
    fast.backend, fast._select = "cuda", lambda: None  # type: ignore[method-assign]
    times, _ = time_steps([step, fast], "eager", CPU, iters=3, warmup=1)
    rows = rows_of([step, fast], times, CPU)
    found = [(row["stage"], row["backend"]) for row in rows]
    assert found == [*((s, "sdpa" if s == "select" else "torch") for s in STAGES), ("step", "sdpa"), ("select", "cuda"),
                     ("step", "cuda")]  # fmt: skip
    assert [row["ran"] for row in rows[-2:]] == ["", ""]  # nothing was counted for it
    ms = {key: float(row["ms_median"]) for key, row in zip(found, rows, strict=True)}
    assert float(rows[2]["share"]) == pytest.approx(ms["select", "sdpa"] / ms["step", "sdpa"], rel=1e-5)
    assert ms["step", "cuda"] < ms["step", "sdpa"]
    facts = facts_of([step, fast], times)["speedup of cuda"]
    assert set(facts) == {"select", "step", "expected"}
    assert facts["step"] == pytest.approx(ms["step", "sdpa"] / ms["step", "cuda"], rel=1e-5)


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

"""What an eager call does on a GPU beside computing: no waiting, no allocation too many, and the fallback."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel.backends import cuda
from nsa_sel.check import check
from nsa_sel.errors import KernelLaunchError
from nsa_sel.testing import Inputs, assert_matches_reference
from tests.backends_under_test import no_kernels
from tests.cases import case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(no_kernels() is not None, reason=f"cuda: {no_kernels()}"),
]

SHAPES = ("h4", "blocks-64", "pages-packed", "draft-causal", "nsa-paper", "many-rows", "hostile-int32")


def kernel_calls() -> int:
    return sum(nsa_sel.stats().get("cuda", {}).values())


def on_gpu(name: str, **options: Any) -> tuple[Inputs, dict[str, Any]]:
    inputs = case(name).inputs()
    return inputs, inputs.to("cuda").arguments(backend="cuda", **options)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_no_call_waits_for_the_gpu(name: str, batch_invariant: bool) -> None:
    inputs, call = on_gpu(name, return_lse=True, batch_invariant=batch_invariant)
    nsa_sel.selection_attention(**call)  # what is set up once may wait
    before = kernel_calls()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = nsa_sel.selection_attention(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kernel_calls() == before + 1
    assert_matches_reference(out.cpu(), lse.cpu(), inputs)


def test_the_call_returns_before_the_gpu_is_done() -> None:
    """The debug mode sees PyTorch's own waits alone; a wait inside the launch would show here."""
    _, call = on_gpu("nsa-paper")
    nsa_sel.selection_attention(**call)
    big = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        big = (big @ big).clamp(-1, 1)
    end = torch.cuda.Event()
    nsa_sel.selection_attention(**call)
    end.record()
    assert not end.query(), "the call came back only after the work before it had ended"
    torch.cuda.synchronize()


def allocations() -> int:
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_allocations_are_out_lse_and_workspace_and_no_more(name: str, return_lse: bool, given_out: bool) -> None:
    _, call = on_gpu(name, return_lse=return_lse)
    shape = (*call["q"].shape[:4], call["v"].shape[-1])
    out = torch.empty(shape, dtype=call["v"].dtype, device="cuda")
    lse = torch.empty(shape[:-1], device="cuda") if return_lse else None
    checked = check(**{key: value for key, value in call.items() if key != "backend"})
    launch = cuda.plan(checked, out, lse, cuda.device_limits(torch.cuda.current_device()))
    if given_out:
        call["out"] = out
    nsa_sel.selection_attention(**call)
    before, ran = allocations(), kernel_calls()
    kept = nsa_sel.selection_attention(**call)
    assert kernel_calls() == ran + 1
    assert allocations() - before == (not given_out) + return_lse + (launch.workspace_floats > 0)
    del kept


def test_calls_leave_no_memory_behind() -> None:
    _, call = on_gpu("nsa-paper", return_lse=True)
    nsa_sel.selection_attention(**call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        nsa_sel.selection_attention(**call)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", SHAPES)
def test_many_runs_give_the_same_bits(name: str) -> None:
    _, call = on_gpu(name, return_lse=True)
    first = nsa_sel.selection_attention(**call)
    for _ in range(20):
        out, lse = nsa_sel.selection_attention(**call)
        assert torch.equal(out, first[0])
        assert torch.equal(lse, first[1])


def test_auto_takes_the_kernel_where_it_may() -> None:
    inputs, call = on_gpu("nsa-paper", return_lse=True)
    call["backend"] = "auto"
    decision = nsa_sel.explain(**call)
    # Compute capability 8.9 is off until it has been measured there, and says so.
    expected = "sdpa" if torch.cuda.get_device_capability() == (8, 9) else "cuda"
    assert decision.backend == expected, decision
    out, lse = nsa_sel.selection_attention(**call)
    assert nsa_sel.stats() == {decision.backend: {decision.reason: 1}}
    assert_matches_reference(out.cpu(), lse.cpu(), inputs)


@pytest.mark.parametrize("name", ["dims-64x64-fp32", "dims-80x40-bf16"])
def test_auto_falls_back_before_the_launch(name: str) -> None:
    inputs, call = on_gpu(name, return_lse=True)
    with pytest.raises(RuntimeError):
        nsa_sel.selection_attention(**call)
    call["backend"] = "auto"
    decision = nsa_sel.explain(**call)
    assert decision.backend == "sdpa"
    out, lse = nsa_sel.selection_attention(**call)
    assert nsa_sel.stats() == {"sdpa": {decision.reason: 1}}
    assert_matches_reference(out.cpu(), lse.cpu(), inputs)


def test_gradients_fall_back_and_arrive() -> None:
    inputs, call = on_gpu("h4")
    call |= {"backend": "auto", "q": call["q"].clone().requires_grad_()}
    assert nsa_sel.explain(**call).backend == "sdpa"
    out = nsa_sel.selection_attention(**call)
    out.float().sum().backward()
    assert call["q"].grad is not None
    assert bool(call["q"].grad.isfinite().all())
    assert_matches_reference(out.cpu(), None, inputs)


def test_a_refused_launch_falls_back_and_the_gpu_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_SEL_CUDA", "1")  # also where the kernel is off by default
    nsa_sel.refresh_routing()
    inputs, call = on_gpu("nsa-paper", return_lse=True)
    call["backend"] = "auto"
    assert nsa_sel.explain(**call).backend == "cuda"

    def refused(_: object) -> None:
        raise KernelLaunchError("decode kernel: too many resources requested for launch")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "run", refused)
        with pytest.warns(RuntimeWarning, match="too many resources"):
            out, lse = nsa_sel.selection_attention(**call)
    assert_matches_reference(out.cpu(), lse.cpu(), inputs)
    assert set(nsa_sel.stats()) == {"sdpa"}
    assert nsa_sel.explain(**call).backend == "sdpa"  # remembered: the kernel is not tried again
    other, other_call = on_gpu("h4", return_lse=True)  # another kernel than the refused one still runs
    out, lse = nsa_sel.selection_attention(**other_call)
    assert_matches_reference(out.cpu(), lse.cpu(), other)


def test_host_time_of_a_call_is_microseconds() -> None:
    """A wide margin over what a call should cost: this is to catch a wait or a compilation, not a slow day."""
    _, call = on_gpu("h4")
    for _ in range(20):
        nsa_sel.selection_attention(**call)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(100):
        nsa_sel.selection_attention(**call)
    assert (time.perf_counter() - started) / 100 < 500e-6
    torch.cuda.synchronize()

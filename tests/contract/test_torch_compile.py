"""torch.compile: one graph without breaks, the same results and gradients, and the operator's own checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import nsa_sel
from nsa_sel import execute, ops
from nsa_sel.call import Call
from nsa_sel.testing import Inputs
from tests.cases import case

NAMES = ("dims-192x128-fp32", "pages-blocks", "draft-causal", "blocks-seq-lens", "no-requests")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def operands(inputs: Inputs, **changes: Any) -> list[Any]:
    """Return what the operator takes before `backend` and `requires_grad`."""
    given = {"max_selected": None, "return_lse": False, "batch_invariant": False} | inputs.arguments(**changes)
    return [given[name] for name in ops._PARAMETERS]


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_and_the_same_bits(name: str) -> None:
    arguments = case(name).inputs().arguments(return_lse=True)
    expected = nsa_sel.selection_attention(**arguments)
    nsa_sel.reset_stats()
    got = compiled(nsa_sel.selection_attention)(**arguments)
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_without_lse_and_with_work_around_the_call() -> None:
    arguments = case("h4").inputs().arguments()

    def layer(q: torch.Tensor, **rest: Any) -> torch.Tensor:
        return nsa_sel.selection_attention(q * 2, **rest).float().sum(-1)

    expected = layer(**arguments)
    torch.testing.assert_close(compiled(layer)(**arguments), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own, while it imports its compiler
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # of torch 2.6's own, of its settings
def test_the_default_compiler() -> None:
    arguments = case("h4").inputs().arguments()

    def layer(q: torch.Tensor, **rest: Any) -> torch.Tensor:
        return nsa_sel.selection_attention(q * 2, **rest).float() + 1

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(**arguments), layer(**arguments))


def test_dynamic_shapes() -> None:
    function = compiled(nsa_sel.selection_attention, dynamic=True)
    for tokens in (17, 33, 70):
        q, k, v = torch.randn(2, 1, 2, 3, 8), torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 16)
        ids = torch.randint(0, 5, (2, 1, 2, 3))
        expected = nsa_sel.selection_attention(q, k, v, block_indices=ids, block_size=4)
        torch.testing.assert_close(function(q, k, v, block_indices=ids, block_size=4), expected)


def test_out_is_written_and_returned() -> None:
    arguments = case("h4").inputs().arguments()
    expected = nsa_sel.selection_attention(**arguments)
    out = torch.empty_like(expected)
    got = compiled(nsa_sel.selection_attention)(**arguments, out=out)
    assert got is out
    assert torch.equal(out, expected)


def test_a_forced_backend_that_cannot_run_raises() -> None:
    arguments = case("h4").inputs().arguments(backend="cuda")
    with pytest.raises(RuntimeError, match="tensors on cpu"):
        compiled(nsa_sel.selection_attention)(**arguments)


def differentiable(inputs: Inputs) -> dict[str, Any]:
    arguments = inputs.arguments(return_lse=True)
    for name in ("q", "k", "v"):
        # unselected rows are NaN: their gradients must be zero all the same
        arguments[name] = arguments[name].clone().requires_grad_()
    return arguments


def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return out.double().sin().sum() + torch.where(lse.isfinite(), lse, 0).double().cos().sum()


@pytest.mark.parametrize("name", ["dims-192x128-fp32", "pages-16", "empty-rows"])
def test_gradients_are_those_of_an_eager_call(name: str) -> None:
    arguments = differentiable(case(name).inputs())
    wanted = [arguments[t] for t in ("q", "k", "v")]
    expected = torch.autograd.grad(loss(*nsa_sel.selection_attention(**arguments)), wanted)
    nsa_sel.reset_stats()
    got = torch.autograd.grad(loss(*compiled(nsa_sel.selection_attention)(**arguments)), wanted)
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}
    for tensor, other in zip(got, expected, strict=True):
        assert torch.isfinite(tensor).all()
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)


def test_gradients_without_lse() -> None:
    arguments = differentiable(case("h4").inputs()) | {"return_lse": False}
    wanted = [arguments[t] for t in ("q", "k", "v")]
    expected = torch.autograd.grad(nsa_sel.selection_attention(**arguments).float().sin().sum(), wanted)
    got = torch.autograd.grad(compiled(nsa_sel.selection_attention)(**arguments).float().sin().sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_gradients_and_out_exclude_each_other() -> None:
    arguments = differentiable(case("h4").inputs())
    with pytest.raises(RuntimeError, match="expected no gradients"):
        compiled(nsa_sel.selection_attention)(**arguments, out=torch.empty_like(arguments["q"]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own, in torch.func
def test_forward_mode_raises_instead_of_returning_zeros() -> None:
    """The compiled graph runs below autograd, where tangents get lost."""
    inputs = case("dims-64x64-fp64").inputs()
    dense = {name: getattr(inputs, name).nan_to_num(0.0) for name in ("q", "k", "v")}
    function = compiled(nsa_sel.selection_attention)
    function(**inputs.arguments(**dense))  # compiled before, and not for forward mode
    for name, tensor in dense.items():
        for call in (nsa_sel.selection_attention, function, compiled(nsa_sel.selection_attention)):
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
                call(**inputs.arguments(**dense | {name: forward_ad.make_dual(tensor, tensor)}))
            torch._dynamo.reset()

    rest = inputs.arguments(**dense)
    del rest["q"]

    def derivative(q: torch.Tensor) -> torch.Tensor:
        def attend(q: torch.Tensor) -> torch.Tensor:
            return nsa_sel.selection_attention(q, **rest)  # type: ignore[return-value]

        return torch.func.jvp(attend, (q,), (q,))[1]

    for call in (derivative, compiled(derivative)):
        with pytest.raises(RuntimeError, match="forward-mode"):
            call(dense["q"])


def test_a_second_derivative_is_not_dropped() -> None:
    """The loss is linear in out: nothing that comes in from above would tell autograd of a second derivative."""
    inputs = case("dims-64x64-fp64").inputs()
    leaves = [getattr(inputs, name).nan_to_num(0.0).requires_grad_() for name in ("q", "k", "v")]
    rest = {name: value for name, value in inputs.arguments().items() if name not in ("q", "k", "v")}

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nsa_sel.selection_attention(q, k, v, **rest)  # type: ignore[return-value]

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.nsa_sel.selection_attention.default(*operands(inputs, q=q, k=k, v=v), "auto", True)[0]

    def penalty(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    torch.testing.assert_close(penalty(operator), penalty(eager), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="double backward"):
        penalty(compiled(eager))


@pytest.mark.parametrize("gradients", [False, True])
def test_routing_learns_that_gradients_are_required(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs below autograd, where a kernel without gradients would look good enough."""
    seen: list[bool] = []

    def route(call: Call, backend: str) -> nsa_sel.Decision:
        seen.append(call.requires_grad)
        return nsa_sel.Decision("sdpa", "test")

    monkeypatch.setattr(execute, "route", route)
    arguments = differentiable(case("h4").inputs())
    with torch.set_grad_enabled(gradients):
        compiled(nsa_sel.selection_attention)(**arguments)
    assert seen == [gradients]


@pytest.mark.parametrize(("gradients", "lse"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("name", ["dims-64x64-fp64", "pages-blocks"])
def test_the_operator_is_well_formed(name: str, gradients: bool, lse: bool) -> None:
    inputs = case(name).inputs()
    q, k, v = (t.nan_to_num(0.0).requires_grad_(gradients) for t in (inputs.q, inputs.k, inputs.v))
    arguments = (*operands(inputs, q=q, k=k, v=v, return_lse=lse), "auto", gradients)
    results = torch.library.opcheck(torch.ops.nsa_sel.selection_attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.zeros(1, 1, 2, 4, 64), "out: expected bfloat16"),  # copy_ would round it silently
        (torch.zeros(3, 1, 2, 4, 64, dtype=torch.bfloat16), r"out: expected bfloat16 \[B=1"),  # and spread this one
    ],
)
def test_out_is_checked_while_tracing(out: torch.Tensor, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        compiled(nsa_sel.selection_attention)(**case("h4").inputs().arguments(), out=out)


@pytest.mark.parametrize("name", ["causal", "return_lse", "batch_invariant"])
def test_flags_are_checked_while_tracing(name: str) -> None:
    arguments = case("h4").inputs().arguments() | {name: 1}
    with pytest.raises(RuntimeError, match=f"{name}: expected a bool, got int 1"):
        compiled(nsa_sel.selection_attention)(**arguments)

"""Gradients of packed SDPA against finite differences and against autograd through plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel.backends import sdpa
from nsa_sel.check import check
from nsa_sel.testing import Inputs
from tests.cases import Case, blocks, case, fixed, spans


def leaves(inputs: Inputs) -> dict[str, Any]:
    arguments = inputs.arguments()
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].clone().requires_grad_()
    return arguments


@pytest.mark.parametrize("name", ["spans", "blocks", "pages", "draft"])
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    small = {
        "spans": Case("", spans(6), h=2, n=3, Dk=3, Dv=2, S_kv=9, dtype=torch.float64, seed=3),
        "blocks": Case("", blocks(1), h=2, n=3, Dk=2, Dv=3, S_kv=9, block_size=4, dtype=torch.float64),
        "pages": Case("", spans(6), h=2, n=2, Dk=3, Dv=3, S_kv=8, page_size=2, seq_lens=(7,), dtype=torch.float64),
        "draft": Case("", spans(6), S=3, h=1, n=2, Dk=2, Dv=2, S_kv=8, dtype=torch.float64, causal=True),
    }[name]
    arguments = leaves(small.inputs())
    with torch.no_grad():
        for tensor in ("q", "k", "v"):
            arguments[tensor].nan_to_num_(0.0)  # finite differences of NaN are NaN

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nsa_sel.selection_attention(**arguments | {"q": q, "k": k, "v": v})  # type: ignore[return-value]

    leaves_ = (arguments["q"], arguments["k"], arguments["v"])
    assert torch.autograd.gradcheck(function, leaves_)
    assert torch.autograd.gradgradcheck(function, leaves_)
    assert set(nsa_sel.stats()) == {"sdpa"}


def plain_attention(inputs: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """The same function by autograd alone, row by row: out and lse of every row that selects something."""
    out, lse = [], []
    for b, s, g in inputs.rows():
        tokens = torch.tensor(inputs.tokens((b, s, g)), dtype=torch.int64)
        if not tokens.numel():
            continue
        if inputs.block_table is None:
            keys, values = k[b, g, tokens], v[b, g, tokens]
        else:
            page, offset = inputs.block_table[b, tokens // k.shape[2]].long(), tokens % k.shape[2]
            keys, values = k[page, g, offset], v[page, g, offset]
        logits = q[b, s, g] @ keys.T * q.shape[-1] ** -0.5
        out.append(torch.softmax(logits, -1) @ values)
        lse.append(torch.logsumexp(logits, -1))
    return torch.stack(out), torch.stack(lse)


@pytest.mark.parametrize("budget", [sdpa.MEMORY_BUDGET, 100_000])
@pytest.mark.parametrize(
    "name", ["dims-64x64-fp64", "empty-rows", "duplicates", "pages-16", "draft-causal", "many-rows"]
)
def test_gradients_of_out_and_lse(name: str, budget: int) -> None:
    """Against autograd through a plain row-by-row computation; unselected rows are NaN and get gradient 0."""
    inputs = replace(case(name), dtype=torch.float64).inputs()
    ours, plain = leaves(inputs), leaves(inputs)
    out, lse = sdpa.run(check(**ours, return_lse=True), budget)
    assert lse is not None
    filled = torch.tensor([len(inputs.tokens(row)) > 0 for row in inputs.rows()])
    (out.flatten(0, 2)[filled].sin().sum() + lse.flatten(0, 2)[filled].cos().sum()).backward()
    other_out, other_lse = plain_attention(inputs, plain["q"], plain["k"], plain["v"])
    (other_out.sin().sum() + other_lse.cos().sum()).backward()
    for tensor in ("q", "k", "v"):
        got, expected = ours[tensor].grad, plain[tensor].grad
        assert got.isfinite().all(), "NaN from an unselected row reached a gradient"
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # lse is fp32, and so is its gradient


@pytest.mark.parametrize("budget", [sdpa.MEMORY_BUDGET, 100_000])
@pytest.mark.parametrize("name", ["dims-64x64-fp64", "duplicates", "pages-16", "many-rows"])
def test_a_gradient_penalty(name: str, budget: int) -> None:
    """The square of a gradient, differentiated again: unselected rows are NaN and stay out of it."""
    inputs = replace(case(name), dtype=torch.float64).inputs()
    ours, plain = leaves(inputs), leaves(inputs)
    filled = torch.tensor([len(inputs.tokens(row)) > 0 for row in inputs.rows()])
    out, lse = sdpa.run(check(**ours, return_lse=True), budget)
    assert lse is not None
    other_out, other_lse = plain_attention(inputs, plain["q"], plain["k"], plain["v"])
    for tensors, loss in (
        (ours, out.sum() + lse.flatten(0, 2)[filled].sum()),
        (plain, other_out.sum() + other_lse.sum()),
    ):
        wanted = [tensors[name] for name in ("q", "k", "v")]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()
    for tensor in ("q", "k", "v"):
        got, expected = ours[tensor].grad, plain[tensor].grad
        assert got.isfinite().all(), "NaN from an unselected row reached a gradient"
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_call_that_selects_nothing_has_zero_gradients() -> None:
    arguments = leaves(case("all-empty").inputs())
    out = nsa_sel.selection_attention(**arguments)
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    for tensor in ("q", "k", "v"):
        assert torch.equal(arguments[tensor].grad, torch.zeros_like(arguments[tensor]))


def test_pages_that_are_missing_have_no_gradient() -> None:
    inputs = replace(case("pages-16"), dtype=torch.float64).inputs()
    assert inputs.block_table is not None
    table = inputs.block_table.clone()
    table[0] = -1
    inputs = replace(inputs, block_table=table)
    ours, plain = leaves(inputs), leaves(inputs)
    out = nsa_sel.selection_attention(**ours)
    assert isinstance(out, torch.Tensor)
    out.sin().sum().backward()
    plain_attention(inputs, plain["q"], plain["k"], plain["v"])[0].sin().sum().backward()
    for tensor in ("q", "k", "v"):
        torch.testing.assert_close(ours[tensor].grad, plain[tensor].grad)


def test_a_gradient_of_nan_stays_with_its_row() -> None:
    """Slots without a token point at token 0 of some request: nothing may be added there, NaN least of all."""
    inputs = Case("", fixed([[[9, 12]], [[20, 40]]]), S_kv=64, G=1, S=2, causal=False, dtype=torch.float64).inputs()
    arguments = leaves(inputs)
    out = nsa_sel.selection_attention(**arguments)
    assert isinstance(out, torch.Tensor)
    gradient = torch.ones_like(out)
    gradient[0, 0] = torch.nan
    out.backward(gradient)
    for tensor in ("k", "v"):
        poisoned = arguments[tensor].grad.isnan().any(-1).flatten().nonzero().flatten().tolist()
        assert poisoned == [9, 10, 11]


def test_half_gradients_are_summed_in_fp32() -> None:
    """2,048 rows add to one token: sums kept in bf16 would stop at 256."""
    rows = 2048
    ranges = torch.tensor([0, 1]).expand(1, rows, 1, 1, 2)
    q = torch.zeros(1, rows, 1, 1, 8, dtype=torch.bfloat16)
    v = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    out = nsa_sel.selection_attention(q, torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), v, ranges, causal=False)
    assert isinstance(out, torch.Tensor)
    out.backward(torch.ones_like(out))
    assert torch.equal(v.grad, torch.full_like(v, rows))


def test_a_selection_changed_before_backward_is_noticed() -> None:
    arguments = leaves(case("h4").inputs())
    out = nsa_sel.selection_attention(**arguments)
    arguments["ranges"].zero_()
    assert isinstance(out, torch.Tensor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

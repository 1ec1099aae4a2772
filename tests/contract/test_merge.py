"""Merging partial attentions: the attention over all parts, in every dtype, whatever is empty, with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

import nsa_sel
from nsa_sel.testing import assert_matches_reference, selection_attention_reference
from tests.cases import case

NAN, INF = float("nan"), float("inf")


def states(parts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(parts, 2, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    lses = 4 * torch.randn(parts, 2, 3, generator=generator, dtype=torch.float64)
    return outs, lses.to(torch.float64 if dtype == torch.float64 else torch.float32)


def expected_of(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the merge in fp64 by softmax and logsumexp, which share no line with the function."""
    wide = lses.double()
    return (torch.softmax(wide, 0).unsqueeze(-1) * outs.double()).sum(0), torch.logsumexp(wide, 0)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_merge_is_the_softmax_over_parts(parts: int, dtype: torch.dtype) -> None:
    outs, lses = states(parts, dtype)
    out, lse = nsa_sel.merge_states(outs, lses)
    expected, expected_lse = expected_of(outs, lses)
    assert (out.dtype, lse.dtype) == (dtype, lses.dtype)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=epsilon, atol=4 * epsilon)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=4 * torch.finfo(lses.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["dims-192x128-bf16", "blocks-64", "pages-16", "empty-rows", "draft-causal"])
def test_parts_of_a_selection_give_the_whole(name: str) -> None:
    inputs = case(name).inputs()
    ranges = inputs.ranges
    if ranges is None:
        ranges = nsa_sel.blocks_to_ranges(inputs.block_indices, inputs.block_size)
    arguments = inputs.arguments(return_lse=True, backend="sdpa") | dict(block_indices=None, block_size=None)
    nsa_sel.reset_stats()
    parts = [nsa_sel.selection_attention(**arguments | {"ranges": slot}) for slot in ranges.split(1, dim=3)]
    assert nsa_sel.stats() == {"sdpa": {"backend='sdpa'": ranges.shape[3]}}
    outs, lses = zip(*parts, strict=True)
    out, lse = nsa_sel.merge_states(outs, lses)
    assert_matches_reference(out, lse, inputs)


@pytest.mark.parametrize("garbage", [0.0, NAN, INF])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_empty_part_changes_no_bit_wherever_it_stands(place: int, garbage: float) -> None:
    outs, lses = states(3)
    expected = nsa_sel.merge_states(outs, lses)
    empty_out, empty_lse = torch.full_like(outs[:1], garbage), torch.full_like(lses[:1], -INF)
    with_empty = torch.cat([outs[:place], empty_out, outs[place:]]), torch.cat([lses[:place], empty_lse, lses[place:]])
    assert all(map(torch.equal, nsa_sel.merge_states(*with_empty), expected))


def test_only_empty_parts_give_zero_and_one_part_comes_back() -> None:
    outs, lses = states(3)
    lses[:, 0] = -INF
    lses[:2, 1] = -INF
    outs[:, 0, 0] = NAN
    out, lse = nsa_sel.merge_states(list(outs), list(lses))
    assert not out[0].any()
    assert (lse[0] == -INF).all()
    assert torch.equal(out[1], outs[2, 1])
    assert torch.equal(lse[1], lses[2, 1])


def test_special_values_agree_with_logsumexp() -> None:
    values = (INF, -INF, NAN, 0.0, 88.0, -3.4e38)
    lses = torch.tensor(list(itertools.product(values, repeat=2))).T
    _, lse = nsa_sel.merge_states(torch.ones(*lses.shape, 4), lses)
    torch.testing.assert_close(lse, torch.logsumexp(lses, 0), rtol=1e-6, atol=0, equal_nan=True)


def test_far_apart_and_large_do_not_overflow() -> None:
    lses = torch.tensor([[5000.0, -5000.0], [4990.0, 5000.0]])
    outs = torch.stack([torch.full((2, 4), 1.0), torch.full((2, 4), 3.0)])
    out, lse = nsa_sel.merge_states(outs, lses)
    expected, expected_lse = expected_of(outs, lses)
    torch.testing.assert_close((out, lse), (expected.float(), expected_lse.float()))


def test_the_order_decides_the_bits_and_nothing_else_does() -> None:
    outs, lses = states(7)
    expected = nsa_sel.merge_states(outs, lses)
    assert all(map(torch.equal, nsa_sel.merge_states(tuple(outs), tuple(lses)), expected))
    strided = outs.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(map(torch.equal, nsa_sel.merge_states(strided, lses), expected))
    # one row alone, as another batch would hold it
    assert all(map(torch.equal, nsa_sel.merge_states(outs[:, :1], lses[:, :1]), (expected[0][:1], expected[1][:1])))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own forward mode
def test_gradients() -> None:
    outs, lses = (t.requires_grad_() for t in states(3, torch.float64))
    assert torch.autograd.gradcheck(nsa_sel.merge_states, (outs, lses), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(nsa_sel.merge_states, (outs, lses))


def test_gradients_beside_empty_parts_are_finite() -> None:
    outs, lses = states(2)
    lses[0] = lses[1, 0] = -INF
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    out, lse = nsa_sel.merge_states(outs, lses)
    (out.sum() + lse.masked_fill(lse == -INF, 0).sum()).backward()
    assert torch.isfinite(outs.grad).all()
    assert torch.isfinite(lses.grad).all()
    assert torch.equal(outs.grad[0], torch.zeros_like(outs[0]))
    assert torch.equal(outs.grad[1, 1], torch.ones_like(outs[1, 1]))


def test_gradients_through_parts_are_those_of_the_whole() -> None:
    arguments = case("dims-64x64-fp64").inputs().arguments(return_lse=True, backend="sdpa")
    tensors = [arguments[name].nan_to_num(0).requires_grad_() for name in "qkv"]
    arguments |= dict(zip("qkv", tensors, strict=True))
    whole = nsa_sel.selection_attention(**arguments)
    parts = [
        nsa_sel.selection_attention(**arguments | {"ranges": slot}) for slot in arguments["ranges"].split(1, dim=3)
    ]
    merged = nsa_sel.merge_states(*zip(*parts, strict=True))
    expected = torch.autograd.grad(whole[0].sin().sum() + whole[1].nan_to_num(neginf=0).sum(), tensors)
    got = torch.autograd.grad(merged[0].sin().sum() + merged[1].nan_to_num(neginf=0).sum(), tensors)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # the parts' lse is fp32


def test_under_the_compiler_and_vmap() -> None:
    outs, lses = states(3)
    expected = nsa_sel.merge_states(outs, lses)
    compiled = torch.compile(nsa_sel.merge_states, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outs, lses), expected)
    rows = torch.func.vmap(nsa_sel.merge_states, in_dims=1)(outs, lses)
    torch.testing.assert_close(rows, expected)


def test_an_attention_sink_is_a_part_without_values() -> None:
    inputs = case("dims-64x64-fp32").inputs()
    out, lse = nsa_sel.selection_attention(**inputs.arguments(return_lse=True))
    sink = torch.randn(inputs.q.shape[2:4]).expand(lse.shape)
    merged, _ = nsa_sel.merge_states([out, torch.zeros_like(out)], [lse, sink])
    reference, reference_lse = selection_attention_reference(**inputs.arguments())
    expected = reference * torch.sigmoid(reference_lse - sink).unsqueeze(-1)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)


OUT, LSE = torch.zeros(2, 4), torch.zeros(2)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "text"),
    [
        ([], [], nsa_sel.ArgumentError, "outs: expected at least one part, got none"),
        ([OUT], [], nsa_sel.ArgumentError, "lses: expected at least one part"),
        ([OUT, OUT], [LSE], nsa_sel.ArgumentError, "lses: expected 2 parts"),
        (3, [LSE], nsa_sel.ArgumentTypeError, "outs: expected a list, tuple or tensor of parts, got int"),
        (torch.tensor(1.0), LSE, nsa_sel.ArgumentError, "outs: expected \\[parts, ...\\]"),
        ([OUT, 1.0], [LSE, LSE], nsa_sel.ArgumentTypeError, "outs\\[1\\]: expected a torch.Tensor, got float"),
        ([OUT, OUT.half()], [LSE, LSE], nsa_sel.ArgumentTypeError, "outs\\[1\\]: expected float32, got float16"),
        ([OUT.long()], [LSE], nsa_sel.ArgumentTypeError, "outs\\[0\\]: expected float16 or .*, got int64"),
        ([OUT], [LSE.half()], nsa_sel.ArgumentTypeError, "lses\\[0\\]: expected float32 or float64, got float16"),
        ([OUT, OUT[:1]], [LSE, LSE], nsa_sel.ArgumentError, "outs\\[1\\]: expected \\[2, 4\\], got \\[1, 4\\]"),
        ([OUT], [LSE[:1]], nsa_sel.ArgumentError, "lses\\[0\\]: expected \\[2\\], got \\[1\\]"),
        ([OUT], [LSE.to("meta")], nsa_sel.ArgumentError, "lses\\[0\\]: expected device cpu, got meta"),
        ([torch.tensor(1.0)], [LSE], nsa_sel.ArgumentError, "outs\\[0\\]: expected \\[..., D\\], got \\[\\]"),
    ],
)  # fmt: skip
def test_wrong_parts_are_refused(outs: object, lses: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        nsa_sel.merge_states(outs, lses)  # type: ignore[arg-type]

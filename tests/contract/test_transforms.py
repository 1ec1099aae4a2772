"""What sees the call as one operator: torch.export, torch.func, fake and meta tensors; what cannot be right raises."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nsa_sel
from nsa_sel.testing import assert_matches_reference
from tests.cases import case

B, S, G, h, D, S_kv, L_SEL = 2, 1, 2, 4, 8, 64, 8
Tensors = tuple[torch.Tensor, ...]


def tensors(entries: int = B, tokens: int = S_kv, seed: int = 0) -> Tensors:
    """Return q, k, v and block indices in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    blocks = torch.randint(-1, tokens // L_SEL, (entries, S, G, 3), generator=generator)
    return normal(entries, S, G, h, D), normal(entries, G, tokens, D), normal(entries, G, tokens, D), blocks


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return nsa_sel.selection_attention(q, k, v, block_indices=blocks, block_size=L_SEL)


def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v, blocks).sin().sum()


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> Tensors:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(loss(*leaves, blocks), leaves)


class Layer(torch.nn.Module):
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, seq_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = nsa_sel.selection_attention(
            q * 2, k, v, block_indices=blocks, block_size=L_SEL, seq_lens=seq_lens, return_lse=True
        )
        return out + 1, lse


def lengths(entries: int, tokens: int) -> torch.Tensor:
    return torch.arange(tokens - entries + 1, tokens + 1, dtype=torch.int32)


def test_export_with_any_batch_and_context() -> None:
    batch, context = torch.export.Dim("batch", min=2), torch.export.Dim("context", min=16)
    shapes = {"q": {0: batch}, "k": {0: batch, 2: context}, "v": {0: batch, 2: context}}
    program = torch.export.export(
        Layer(), (*tensors(), lengths(B, S_kv)), dynamic_shapes=shapes | {"blocks": {0: batch}, "seq_lens": {0: batch}}
    )
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.nsa_sel.selection_attention.default) == 1
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for entries, tokens in ((2, 64), (5, 200), (3, 16)):
        arguments = (*tensors(entries, tokens), lengths(entries, tokens))
        nsa_sel.reset_stats()
        got = loaded(*arguments)
        assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}
        torch.testing.assert_close(got, Layer()(*arguments), rtol=0, atol=0)


def test_no_recompilation_as_batch_and_context_change() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(Layer(), fullgraph=True, dynamic=True, backend=counter)
    for step in range(24):
        entries = 5 + step % 3  # sizes that are equal at first are taken for one, so none of G, h, D and n
        arguments = (*tensors(entries, 64 + step, seed=step), lengths(entries, 64 + step))
        torch.testing.assert_close(layer(*arguments), Layer()(*arguments), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_lengths_pages_and_selections_are_data() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nsa_sel.selection_attention, fullgraph=True, backend=counter)
    inputs = case("pages-blocks").inputs()
    arguments = inputs.arguments(return_lse=True)
    for step in range(4):
        arguments["seq_lens"] = inputs.seq_lens - step
        arguments["block_indices"] = inputs.block_indices.roll(step, 0)
        arguments["counts"] = torch.full(inputs.q.shape[:3], 3 - step % 2, dtype=torch.int32)
        torch.testing.assert_close(compiled(**arguments), nsa_sel.selection_attention(**arguments), equal_nan=True)
    assert counter.frame_count == 1


def test_grad_and_vjp() -> None:
    q, k, v, blocks = tensors()
    expected = gradients(q, k, v, blocks)
    nsa_sel.reset_stats()
    got = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v, blocks)
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    out, pull = torch.func.vjp(lambda q, k, v: attend(q, k, v, blocks), q, k, v)
    torch.testing.assert_close(pull(out.cos()), expected, rtol=0, atol=0)


def test_gradients_with_lse() -> None:
    q, k, v, blocks = tensors()

    def both(q: torch.Tensor) -> torch.Tensor:
        out, lse = nsa_sel.selection_attention(q, k, v, block_indices=blocks, block_size=L_SEL, return_lse=True)
        return out.sin().sum() + lse.nan_to_num(neginf=0).double().cos().sum()

    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(both)(q), torch.autograd.grad(both(leaf), leaf)[0], rtol=0, atol=0)


def test_vmap() -> None:
    models = [tensors(seed=seed) for seed in range(3)]
    expected = torch.stack([attend(*model) for model in models])
    assert torch.equal(torch.func.vmap(attend)(*map(torch.stack, zip(*models, strict=True))), expected)
    _, k, v, blocks = models[0]
    many = torch.stack([model[0] for model in models], dim=2)
    got = torch.func.vmap(attend, in_dims=(2, None, None, None), out_dims=1)(many, k, v, blocks)
    assert torch.equal(got, torch.stack([attend(one, k, v, blocks) for one in many.unbind(2)], dim=1))


def test_gradients_of_each_sample() -> None:
    models = [tensors(seed=seed) for seed in range(3)]
    together = tuple(map(torch.stack, zip(*models, strict=True)))
    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*together)
    for i, model in enumerate(models):
        torch.testing.assert_close(tuple(t[i] for t in got), gradients(*model), rtol=0, atol=0)


def test_jacobians_by_reverse_mode() -> None:
    q, k, v, blocks = tensors(1, 16)
    expected = torch.autograd.functional.jacobian(lambda q: attend(q, k, v, blocks), q)
    torch.testing.assert_close(torch.func.jacrev(attend)(q, k, v, blocks), expected)
    got = torch.autograd.functional.jacobian(lambda q: attend(q, k, v, blocks), q, vectorize=True)
    torch.testing.assert_close(got, expected)


def test_batched_gradients_of_an_eager_call() -> None:
    q, k, v, blocks = tensors()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves, blocks)
    pulls = torch.stack([out.detach().cos(), torch.ones_like(out)])
    got = torch.autograd.grad(out, leaves, pulls, is_grads_batched=True, retain_graph=True)
    for i, pull in enumerate(pulls):
        torch.testing.assert_close([t[i] for t in got], list(torch.autograd.grad(out, leaves, pull, retain_graph=True)))


def test_functional_call_and_functionalize() -> None:
    class Projected(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
            return loss(q * self.scale, k, v, blocks)

    layer, arguments = Projected(), tensors()
    parameters = dict(layer.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(layer, p, arguments))(parameters)
    torch.testing.assert_close(got["scale"], torch.autograd.grad(layer(*arguments), layer.scale)[0])
    assert torch.equal(torch.func.functionalize(attend)(*arguments), attend(*arguments))


FIRST = "expected reverse-mode derivatives of first order, got another"
FORWARD = "q: expected no forward-mode derivative to be asked for, got a dual tensor"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own forward mode
@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (lambda f: torch.func.grad(lambda q: torch.func.grad(f)(q).sum()), FIRST),
        (torch.func.hessian, FIRST),
        (lambda f: torch.func.jacrev(torch.func.jacrev(f)), FIRST),
        (torch.func.jacfwd, FORWARD),
        (lambda f: lambda q: torch.func.jvp(f, (q,), (q,)), FORWARD),
        (lambda f: lambda q: torch.func.linearize(f, q), FORWARD),
    ],
    ids=["grad-grad", "hessian", "jacrev-jacrev", "jacfwd", "jvp", "linearize"],
)
def test_derivatives_that_there_are_not_raise(transform: Callable[..., Any], text: str) -> None:
    q, k, v, blocks = tensors(1, 16)
    with pytest.raises(nsa_sel.AutogradError, match=text):
        transform(lambda q: loss(q, k, v, blocks))(q)


def test_compiled_vmap_is_right_and_compiled_grad_raises() -> None:
    torch._dynamo.reset()
    models = tuple(map(torch.stack, zip(*(tensors(seed=seed) for seed in range(2)), strict=True)))
    compiled = torch.compile(torch.func.vmap(attend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*models), torch.func.vmap(attend)(*models))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(*tensors())


@pytest.mark.parametrize("lse", [False, True])
def test_meta_and_fake_tensors_give_shapes_and_run_nothing(lse: bool) -> None:
    inputs = case("pages-blocks").inputs()
    arguments = inputs.arguments(return_lse=lse)
    real = nsa_sel.selection_attention(**arguments)
    nsa_sel.reset_stats()
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        inside = nsa_sel.selection_attention(**fake)
    outside = nsa_sel.selection_attention(**fake)  # such tensors live on after their mode
    meta = nsa_sel.selection_attention(
        **{n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    )
    assert nsa_sel.stats() == {}
    for got in (inside, outside, meta):
        for one, other in zip(got if lse else [got], real if lse else [real], strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_make_fx_traces_one_operator() -> None:
    arguments, others = tensors(seed=0), tensors(seed=1)
    graph = make_fx(attend)(*arguments)
    assert torch.equal(graph(*others), attend(*others))  # and not the selection that was traced


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace_is_refused() -> None:
    with pytest.raises(nsa_sel.BackendError, match=r"torch.jit.trace: expected no call in it"):
        torch.jit.trace(attend, tensors())


def test_subclasses_of_tensors_take_the_operator() -> None:
    class Named(torch.Tensor):
        pass

    q, k, v, blocks = tensors()
    got = attend(q.as_subclass(Named), k, v, blocks)
    assert torch.equal(got.as_subclass(torch.Tensor), attend(q, k, v, blocks))
    inputs = case("h4").inputs()
    out, lse = nsa_sel.selection_attention(**inputs.arguments(return_lse=True) | {"q": torch.nn.Parameter(inputs.q)})
    assert_matches_reference(out.detach(), lse.detach(), inputs)


@pytest.mark.parametrize("name", ["dims-192x128-fp16", "dims-192x128-fp32", "empty-rows", "no-slots"])
def test_results_are_as_contiguous_as_the_operator_says(name: str) -> None:
    for result in nsa_sel.selection_attention(**case(name).inputs().arguments(return_lse=True)):
        assert result.is_contiguous()

"""The function as one operator, one node: for torch.compile, torch.export, torch.func and fake tensors.

Plain eager calls never come here: the dispatcher costs several microseconds that a decode step does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

from nsa_sel import execute
from nsa_sel.backends import sdpa
from nsa_sel.call import Call
from nsa_sel.check import PARAMETERS, check, check_out, check_scale, flag, refuse_gradients, refuse_tangents
from nsa_sel.errors import AutogradError, BackendError

_TYPES = {
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Tensor?",
    "int | None": "SymInt?",
    "float | None": "float?",
    "float | torch.Tensor | None": "Tensor?",  # a number is made a tensor
    "bool": "bool",
}
# The operator takes the arguments of `check` one by one: all but out, which is copied to, then these two.
_PARAMETERS = {name: p for name, p in PARAMETERS.items() if name != "out"}
_OUT = tuple(PARAMETERS).index("out")
_NAMES = (*_PARAMETERS, "backend", "requires_grad")
_ARGUMENTS = ", ".join(
    [f"{_TYPES[p.annotation]} {name}" for name, p in _PARAMETERS.items()] + ["str backend", "bool requires_grad"]
)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# What says that someone watches calls: torch.func; FakeTensorMode and make_fx; torch.jit.trace.
MODES = (torch._C._are_functorch_transforms_active, _len_torch_dispatch_stack, torch._C._is_tracing)
_NO_SECOND = (
    "torch.func: expected reverse-mode derivatives of first order, got another asked for (a second one by "
    "reverse mode: torch.autograd.grad(create_graph=True))"
)
_LSE = _NAMES.index("return_lse")
_TENSORS = tuple(i for i, p in enumerate(_PARAMETERS.values()) if _TYPES[p.annotation].startswith("Tensor"))

_library = torch.library.Library("nsa_sel", "DEF")
_library.define(f"selection_attention({_ARGUMENTS}) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"selection_attention_backward(Tensor out, Tensor? d_out, Tensor? d_lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def must_see(q: torch.Tensor) -> bool:
    """Whether a call must be one operator, since its tensors stand for others or someone watches what is done to them.

    The backends read values back and would bake them into what is traced, or fail on tensors that have none.
    """
    if torch._C._is_tracing():
        raise BackendError("torch.jit.trace: expected no call in it (it would freeze the selection), got one")
    return (
        any(mode() for mode in MODES)
        or type(q) not in _PLAIN  # a fake tensor outside of its mode, or another subclass
        or q.is_meta
    )


def attend(*arguments: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Call the operator with the arguments of `selection_attention`; out, and with `return_lse` (out, lse)."""
    # in words that torch.compile of torch 2.6 can trace
    values = list(arguments[:-1])
    backend = arguments[-1]
    out = values.pop(_OUT)
    q, k, v = values[:3]
    refuse_tangents({"q": q, "k": k, "v": v})
    # below autograd, where the operator runs, tensors no longer tell whether gradients will be asked of them
    requires_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if requires_grad:
        refuse_gradients({"k": k, "v": v})
    for name, cache in (("k_scale", k), ("v_scale", v)):
        place = _NAMES.index(name)
        given: Any = values[place]
        factor: Any = 1.0
        if torch.compiler.is_compiling() and isinstance(given, (int, float)) and not isinstance(given, bool):
            given, factor = None, given  # perhaps a symbol, which cannot be looked at
        else:
            given, factor = check_scale(name, given, cache)
        values[place] = q.new_full((1,), factor, dtype=torch.float32) if given is None and factor != 1.0 else given
    for name in ("causal", "return_lse", "batch_invariant"):
        flag(name, values[_NAMES.index(name)])
    if out is not None:
        # while a graph is traced there are no addresses: what `out` shares with other tensors is not seen
        check_out(out, (*q.shape[:4], v.shape[-1]), q.dtype, v.device, requires_grad)
    operator: Any = torch.ops.nsa_sel.selection_attention.default
    if not torch.compiler.is_compiling():
        transform = peek_interpreter_stack()
        if transform is not None and transform.key() != TransformType.Functionalize:
            operator = _Transformed.apply
    result, lse = operator(*values, backend, requires_grad)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if values[_LSE] else result


def _check(arguments: tuple[Any, ...]) -> tuple[Call, str]:
    """Check the operator's arguments; the call says that gradients are required if the operator was told so."""
    *given, backend, requires_grad = arguments
    call = check(**dict(zip(_PARAMETERS, given, strict=True)))
    call.requires_grad = requires_grad
    return call, backend


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out, lse = execute.run(*_check(arguments))
    return out, _no_lse(out) if lse is None else lse


def _backward(
    out: torch.Tensor, d_out: torch.Tensor | None, d_lse: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        d_q, d_k, d_v = sdpa.backward(_check(arguments)[0], out, d_out, d_lse)
    # an operator returns tensors: those of a float8 cache are empty
    return d_q, d_q.new_empty(0) if d_k is None else d_k, d_q.new_empty(0) if d_v is None else d_v


def _no_lse(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty((0,), dtype=torch.float32)


@torch.library.register_fake("nsa_sel::selection_attention", lib=_library)
def _fake_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if forward_ad._current_level >= 0:  # the compiled graph runs below autograd and would drop the tangents
        raise AutogradError("torch.compile: expected no level of forward-mode AD, got a call inside of one")
    q, v = arguments[0], arguments[2]
    out = q.new_empty((*q.shape[:4], v.shape[3]))
    return out, q.new_empty(q.shape[:4], dtype=torch.float32) if arguments[_LSE] else _no_lse(out)


@torch.library.register_fake("nsa_sel::selection_attention_backward", lib=_library)
def _fake_backward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = arguments[3:6]  # behind out, d_out, d_lse
    if k.dtype != q.dtype:
        return q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *(inputs[place] for place in _TENSORS))
    ctx.others = tuple(None if place in _TENSORS else value for place, value in enumerate(inputs))


def _gradients(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None, backward: Any) -> tuple[Any, ...]:
    """Return what `backward`, called like the operator of that name, gives for q, k and v, and None for the rest."""
    arguments = list(ctx.others)
    out, *tensors = ctx.saved_tensors
    for place, tensor in zip(_TENSORS, tensors, strict=True):
        arguments[place] = tensor
    none = (None,) * (len(arguments) - 3)
    if d_out is None and d_lse is None:
        return None, None, None, *none
    d_q, d_k, d_v = backward(out, d_out, d_lse if arguments[_LSE] else None, *arguments)
    if arguments[0].dtype != arguments[1].dtype:  # a float8 cache has no gradients
        d_k = d_v = None
    return d_q, d_k, d_v, *none


def _differentiate(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph=True: the operator's own backward has no derivative
        return _gradients(ctx, d_out, d_lse, lambda *given: sdpa.backward(_check(given[3:])[0], *given[:3]))
    return _gradients(ctx, d_out, d_lse, torch.ops.nsa_sel.selection_attention_backward.default)


class _Transformed(torch.autograd.Function):
    """The operator under torch.func, whose transforms do not know what `register_autograd` has registered."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.nsa_sel.selection_attention.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, d_out, d_lse, _TransformedBackward.apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        raise AutogradError(_NO_SECOND)


class _TransformedBackward(torch.autograd.Function):
    """Its backward, which has no derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.ops.nsa_sel.selection_attention_backward.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        raise AutogradError(_NO_SECOND)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        raise AutogradError(_NO_SECOND)


def _each(operator: Any) -> Any:
    """Return the rule by which vmap runs an operator: a call for each entry of its batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        results = [
            operator(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    return rule


_library.impl("selection_attention", _forward, "CompositeExplicitAutograd")
_library.impl("selection_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_autograd("nsa_sel::selection_attention", _differentiate, setup_context=_save, lib=_library)
for _operator in (torch.ops.nsa_sel.selection_attention, torch.ops.nsa_sel.selection_attention_backward):
    library.register_vmap(_operator.default, _each(_operator.default), lib=_library)

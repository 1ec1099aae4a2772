"""float8_e4m3fn caches: what is refused, what their scales mean, and what reads them besides a plain call."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nsa_sel
from nsa_sel.backends import sdpa
from nsa_sel.reference import selection_attention_reference
from nsa_sel.testing import Inputs, assert_matches_reference
from tests.backends_under_test import BACKENDS, BackendUnderTest
from tests.cases import SCOPES, Case, blocks, case, fixed
from tests.fallback.helpers import call_of, difference

E4M3, E5M2, BF16, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
on_every_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, id=b.name) for b in BACKENDS if b.missing() is None and b.cannot(case("fp8-token")) is None],
)


def good(**changes: Any) -> dict[str, Any]:
    """A call that is right (B=2, S=1, G=3, h=4, Dk=16, Dv=8, S_kv=32, n=1), with some arguments changed."""
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 3, 4, 16, dtype=BF16),
        "k": torch.zeros(2, 3, 32, 16, dtype=E4M3),
        "v": torch.zeros(2, 3, 32, 8, dtype=E4M3),
        "ranges": torch.tensor([0, 5], dtype=torch.int32).expand(2, 1, 3, 1, 2),
    }
    return arguments | changes


def zeros(*shape: int, dtype: torch.dtype = F32, **more: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, **more)


ValueBad, TypeBad, GradBad = nsa_sel.ArgumentError, nsa_sel.ArgumentTypeError, nsa_sel.AutogradError
WIDE = {"k": zeros(2, 3, 32, 16, dtype=BF16), "v": zeros(2, 3, 32, 8, dtype=BF16)}
PAGED = {"k": zeros(7, 3, 8, 16, dtype=E4M3), "v": zeros(7, 3, 8, 8, dtype=E4M3),
         "block_table": zeros(2, 4, dtype=torch.int32)}  # fmt: skip
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("k-alone", good(v=WIDE["v"]), TypeBad,
     r"v: expected float8_e4m3fn \[B=2, G=3, S_kv=32, Dv\], got bfloat16 \[2, 3, 32, 8\]"),
    ("v-alone", good(k=WIDE["k"]), TypeBad, r"v: expected bfloat16 .*, got float8_e4m3fn"),
    ("q-fp32", good(q=zeros(2, 1, 3, 4, 16)), TypeBad, r"k: expected float32 .*, got float8_e4m3fn"),
    ("q-fp8", good(q=zeros(2, 1, 3, 4, 16, dtype=E4M3)), TypeBad, r"q: expected float16 .*, got float8_e4m3fn"),
    ("e5m2", good(k=zeros(2, 3, 32, 16, dtype=E5M2)), TypeBad,
     r"k: expected bfloat16 or float8_e4m3fn .*, got float8_e5m2"),
    ("v-e5m2", good(v=zeros(2, 3, 32, 8, dtype=E5M2)), TypeBad, r"v: expected float8_e4m3fn .*, got float8_e5m2"),
    ("out-fp8", good(out=zeros(2, 1, 3, 4, 8, dtype=E4M3)), TypeBad, r"out: expected bfloat16 .*, got float8_e4m3fn"),
    ("scale-without", good(**WIDE, k_scale=1.0), ValueBad,
     r"k_scale: expected None where k is not float8_e4m3fn, got one with bfloat16"),
    ("v-scale-without", good(**WIDE, v_scale=zeros(1)), ValueBad, r"v_scale: expected None where v is not float8"),
    ("scale-nan", good(k_scale=math.nan), ValueBad, r"k_scale: expected a finite float, a float32 tensor or None, got"),
    ("scale-bool", good(v_scale=True), TypeBad, r"v_scale: expected a finite float, a float32 tensor .*got bool True"),
    ("scale-list", good(v_scale=[1.0]), TypeBad, r"v_scale: expected a finite float, .*got list"),
    ("scale-dtype", good(k_scale=zeros(3, dtype=BF16)), TypeBad, r"k_scale: expected float32 .*, got bfloat16 \[3\]"),
    ("scale-groups", good(k_scale=zeros(2)), ValueBad,
     r"k_scale: expected float32 \[\], \[1\], \[G=3\] or \[2, 3, 32\] like k, got float32 \[2\]"),
    ("scale-tokens", good(v_scale=zeros(2, 3, 31)), ValueBad, r"v_scale: expected .*\[2, 3, 32\] like v, got .*31\]"),
    ("scale-columns", good(k_scale=zeros(2, 3, 32, 1)), ValueBad, r"k_scale: expected .*, got float32 \[2, 3, 32, 1\]"),
    ("scale-pages", good(**PAGED, k_scale=zeros(2, 3, 32)), ValueBad, r"k_scale: expected .*\[7, 3, 8\] like k"),
    ("scale-device", good(k_scale=zeros(1, device="meta")), ValueBad, r"k_scale: expected device cpu .*, got meta"),
    ("scale-sparse", good(k_scale=zeros(3).to_sparse()), TypeBad, r"k_scale: .*got layout torch\.sparse"),
    ("scale-gradient", good(v_scale=zeros(1, requires_grad=True)), GradBad, r"v_scale: expected no gradient"),
    ("k-gradient", good(k=zeros(2, 3, 32, 16, dtype=E4M3).requires_grad_()), GradBad,
     r"k: expected no gradient to be required of a float8_e4m3fn cache, got requires_grad=True"),
]  # fmt: skip


@pytest.mark.parametrize("function", [nsa_sel.selection_attention, nsa_sel.explain], ids=["call", "explain"])
@pytest.mark.parametrize(("arguments", "error", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_named(function: Any, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        function(**arguments)
    assert re.search(text, str(caught.value)), str(caught.value)
    assert nsa_sel.stats() == {}, "a call with bad input ran"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k_scale": 2, "v_scale": 0.5},
        {"k_scale": zeros(()), "v_scale": zeros(1)},
        {"k_scale": zeros(3), "v_scale": None},
        {"k_scale": zeros(6)[::2], "v_scale": zeros(2, 32, 3).transpose(1, 2)},
        {"k_scale": zeros(1, 1, 1).expand(2, 3, 32)},
        {**PAGED, "k_scale": zeros(7, 3, 8), "v_scale": zeros(3)},
        {"out": zeros(2, 1, 3, 4, 8, dtype=BF16), "v_scale": 3.0},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_good_input_passes(changes: dict[str, Any]) -> None:
    out = nsa_sel.selection_attention(**good(**changes))
    assert (out.dtype, out.shape) == (BF16, (2, 1, 3, 4, 8))


def scaled(inputs: Inputs, **scales: Any) -> Inputs:
    return replace(inputs, **scales)


@on_every_backend
def test_a_scale_means_the_same_in_every_form(backend: BackendUnderTest) -> None:
    inputs = case("fp8-none").inputs()
    tokens = inputs.k.shape[:3]
    forms = [scaled(inputs, k_scale=0.25, v_scale=2.0)]
    for shape in ((), (1,), (2,), tokens):
        # powers of two: no form rounds where another does not
        forms.append(scaled(inputs, k_scale=torch.full(shape, 0.25), v_scale=torch.full(shape, 2.0)))
    results = [backend.run(form) for form in forms]
    assert_matches_reference(*results[0], forms[0])
    for out, lse in results[1:]:
        assert_matches_reference(out, lse, forms[0])


@on_every_backend
@pytest.mark.parametrize("scope", ["tensor", "group", "token"])
def test_rows_that_select_nothing_ask_for_no_scale(backend: BackendUnderTest, scope: str) -> None:
    """The second group selects tokens, the first none: its scale is never multiplied."""
    inputs = Case("", fixed([[[3, 3], [9, 1]], [[0, 20], [30, 33]]]), B=2, kv_scope=scope).inputs()
    scales = {}
    for name in ("k_scale", "v_scale"):
        scale = getattr(inputs, name).clone()
        scale[(slice(None), 0) if scope == "token" else 0] = math.nan
        scales[name] = scale
    out, lse = backend.run(scaled(inputs, **scales))
    assert not out[:, :, 0].any()
    assert (lse[:, :, 0] == -math.inf).all()
    assert out[:, :, 1].isnan().all() == (scope == "tensor")


@on_every_backend
def test_selected_nan_shows(backend: BackendUnderTest) -> None:
    """Of a code in V, of V's scale and of K's scale, each in a row of its own."""
    inputs = Case("", fixed([[[0, 40]], [[10, 80]]]), B=2, n=1, kv_scope="token", layout="contiguous").inputs()
    assert isinstance(inputs.k_scale, torch.Tensor)
    assert isinstance(inputs.v_scale, torch.Tensor)
    inputs.v.view(torch.uint8)[0, 0, 5, 7] = 0xFF
    inputs.v_scale[0, 1, 20] = math.nan
    inputs.k_scale[1, 0, 3] = math.nan
    out, lse = backend.run(inputs)
    assert_matches_reference(out, lse, inputs)
    assert out.isnan().sum() == 4 + 4 * 64 + 4 * 64
    assert lse.isnan().sum() == 4


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("largest", [2.0**-7, 2.0**7])
def test_scales_of_any_size_keep_the_bounds(backend: BackendUnderTest, dtype: torch.dtype, largest: float) -> None:
    """A probability times a small scale may leave fp16's range: that must not show."""
    # the default scale, said outright: the bound on the mean error is for values of N(0, 1)
    inputs = Case("", fixed([[[0, 40], [60, 200]]]), kv_scope="token", dtype=dtype, softmax_scale=0.125).inputs()
    assert isinstance(inputs.v_scale, torch.Tensor)
    sizes = torch.logspace(-4, 0, inputs.v_scale.shape[2], base=2).flip(0)
    inputs = scaled(inputs, v_scale=inputs.v_scale * sizes * largest)
    out, lse = backend.run(inputs)
    assert_matches_reference(out, lse, inputs)


@on_every_backend
@pytest.mark.parametrize("scope", SCOPES)
def test_batch_invariant_rows_keep_their_bits(backend: BackendUnderTest, scope: str) -> None:
    inputs = Case("", blocks(), B=8, G=1, n=3, block_size=32, kv_scope=scope, seed=41).inputs()
    out, lse = backend.run(inputs, batch_invariant=True)
    assert_matches_reference(out, lse, inputs)
    for chosen in ([5], [7, 0, 5]):
        tensors: dict[str, Any] = {n: getattr(inputs, n)[chosen] for n in ("q", "block_indices")}
        for name in ("k", "v"):
            tensors[name] = getattr(inputs, name).view(torch.uint8)[chosen].view(E4M3)
            scale = getattr(inputs, f"{name}_scale")
            tensors[f"{name}_scale"] = scale[chosen] if scope == "token" else scale
        part, part_lse = backend.run(replace(inputs, **tensors), batch_invariant=True)
        assert torch.equal(part, out[chosen])
        assert torch.equal(part_lse, lse[chosen])


def test_the_fallback_gathers_bytes_whatever_the_cache_holds() -> None:
    counts = []
    for S_kv in (2048, 65536):
        for scope in ("none", "token"):
            inputs = Case("", blocks(), B=2, G=1, n=8, block_size=64, S_kv=S_kv, kv_scope=scope).inputs()
            before = sdpa.counters()
            out, lse = sdpa.run(call_of(inputs))
            assert_matches_reference(out, lse, inputs)
            counts.append(difference(before).gathered_bytes)
    assert counts == [2 * 8 * 64 * (64 + 64)] * 4


@pytest.mark.parametrize("budget", [1, 10_000, 100_000])
@pytest.mark.parametrize("name", ["fp8-token", "fp8-pages-group", "fp8-packed", "fp8-rows-of-very-different-length"])
def test_any_budget_gives_the_same_answer(name: str, budget: int) -> None:
    inputs = case(name).inputs()
    out, lse = sdpa.run(call_of(inputs), budget)
    assert_matches_reference(out, lse, inputs)


def test_columns_of_padding_stay_zeros_beside_a_nan_scale() -> None:
    """What is padded is kept from call to call: NaN in it would reach calls that select no NaN."""
    wide = Case("", fixed([[[0, 64]]]), Dk=128, Dv=64, kv_scope="token").inputs()
    assert isinstance(wide.v_scale, torch.Tensor)
    clean = nsa_sel.selection_attention(**wide.arguments(backend="sdpa"))
    bad = wide.v_scale.clone()
    bad[..., :64] = math.nan
    assert nsa_sel.selection_attention(**scaled(wide, v_scale=bad).arguments(backend="sdpa")).isnan().all()
    assert torch.equal(nsa_sel.selection_attention(**wide.arguments(backend="sdpa")), clean)


@pytest.mark.parametrize("name", ["fp8-token", "fp8-number", "fp8-pages-group", "fp8-draft-causal", "fp8-empty-rows"])
@pytest.mark.parametrize("through", ["eager", "operator"])
def test_the_gradient_of_q_is_that_on_the_dequantised_cache(name: str, through: str) -> None:
    inputs = case(name).inputs()
    q = inputs.q.detach().clone().requires_grad_()
    attend = nsa_sel.selection_attention
    if through == "operator":
        torch._dynamo.reset()
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    out, lse = attend(**inputs.arguments(q=q, return_lse=True))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().add(lse.masked_fill(lse == -math.inf, 0).sum()).backward()
    exact = inputs.q.double().requires_grad_()
    expected, expected_lse = _differentiable(replace(inputs, q=exact))
    (expected * weights).sum().add(expected_lse.masked_fill(expected_lse == -math.inf, 0).sum()).backward()
    assert q.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(q.grad.double(), exact.grad, rtol=0.02, atol=0.02)
    assert exact.grad.abs().max() > 0.1


def _differentiable(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle detaches its inputs: the same once more, by its rows of K and V as they are for a unit query."""
    from nsa_sel.reference import _fetch

    outs, lses = [], []
    for b, s, g in inputs.rows():
        tokens = inputs.tokens((b, s, g))
        ids = None if inputs.block_table is None else inputs.block_table[b]
        if not tokens:
            outs.append(inputs.q[b, s, g].sum() * torch.zeros(inputs.q.shape[3], inputs.v.shape[-1]).double())
            lses.append(torch.full((inputs.q.shape[3],), -math.inf).double())
            continue
        keys = _fetch(inputs.k, inputs.k_scale, ids, b, g, tokens)
        logits = inputs.q[b, s, g] @ keys.T * inputs.q.shape[-1] ** -0.5
        outs.append(logits.softmax(-1) @ _fetch(inputs.v, inputs.v_scale, ids, b, g, tokens))
        lses.append(logits.logsumexp(-1))
    shape = inputs.q.shape[:3]
    return torch.stack(outs).unflatten(0, shape), torch.stack(lses).unflatten(0, shape)


def test_many_gradients_at_once_are_those_one_by_one() -> None:
    inputs = case("fp8-number").inputs()
    q = inputs.q.detach().clone().requires_grad_()
    out = nsa_sel.selection_attention(**inputs.arguments(q=q))
    many = torch.eye(2, dtype=BF16)[:, :, None, None].expand(2, 2, *out.shape[3:]).reshape(2, *out.shape).clone()
    (together,) = torch.autograd.grad(out, q, many, is_grads_batched=True, retain_graph=True)
    for one, row in zip(together, many, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, q, row, retain_graph=True)[0])


@pytest.mark.parametrize("name", ["fp8-none", "fp8-number", "fp8-pages-group", "fp8-pages-token"])
def test_one_operator_for_torch_compile_fake_and_meta_tensors(name: str) -> None:
    inputs = case(name).inputs()
    arguments = inputs.arguments(return_lse=True)
    out, lse = nsa_sel.selection_attention(**arguments)
    torch._dynamo.reset()  # its limit of recompilations is one for all tests of a process
    compiled = torch.compile(nsa_sel.selection_attention, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(**arguments), (out, lse), strict=True):
        torch.testing.assert_close(got, expected)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        results = nsa_sel.selection_attention(**fake)
    meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    for some in (results, nsa_sel.selection_attention(**meta)):
        assert [(t.shape, t.dtype) for t in some] == [(out.shape, BF16), (lse.shape, F32)]


def test_the_operator_refuses_gradients_of_the_cache() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(nsa_sel.selection_attention, backend="aot_eager", fullgraph=False)
    with pytest.raises(Exception, match="k: expected no gradient"):
        compiled(**good(k=zeros(2, 3, 32, 16, dtype=E4M3).requires_grad_()))


def test_arrays_with_a_float8_dtype() -> None:
    """NumPy has none of its own; JAX's are lent by DLPack 1.1, and torch takes them from 2.10 on."""
    jax = pytest.importorskip("jax")
    inputs = case("fp8-group").inputs()
    expected = nsa_sel.selection_attention(**inputs.arguments())
    arrays = {
        name: jax.dlpack.from_dlpack(t.contiguous()) if isinstance(t, torch.Tensor) else t
        for name, t in inputs.arguments().items()
    }
    out = nsa_sel.selection_attention(**arrays)
    assert torch.equal(torch.from_dlpack(out), expected)


@pytest.mark.parametrize("scope", ["tensor", "group", "token"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_kv_keeps_what_it_says(scope: str, dtype: torch.dtype) -> None:
    k = torch.randn(3, 2, 50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    v = (torch.randn(3, 50, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype) * 30).transpose(1, 2)
    k[1, 1, 7], v[0, 0] = 0, 0
    k8, v8, *scales = nsa_sel.quantize_kv(k, v, scope)
    for cache, stored, scale in ((k, k8, scales[0]), (v, v8, scales[1])):
        assert (stored.dtype, stored.shape, scale.dtype) == (E4M3, cache.shape, F32)
        assert scale.shape == {"tensor": (1,), "group": (2,), "token": (3, 2, 50)}[scope]
        factor = (scale if scope == "token" else scale.view(1, -1, 1)).unsqueeze(-1)
        error = (stored.float() * factor - cache.float()).abs()
        assert (error <= (cache.float().abs() * 2**-4).maximum(factor * 2**-10) * (1 + 1e-5)).all()
        assert stored.float().abs().max() == 448


def test_quantize_kv_of_nothing_and_of_the_smallest_numbers() -> None:
    k8, _, k_scale, v_scale = nsa_sel.quantize_kv(torch.zeros(1, 2, 0, 8), torch.full((1, 2, 0, 8), 1e-44))
    assert (k8.numel(), k_scale.item(), v_scale.item()) == (0, 1, 1)
    tiny = torch.full((1, 2, 3, 8), 1e-44)
    k8, _, k_scale, _ = nsa_sel.quantize_kv(tiny, tiny, "token")
    assert not (k8.float() * k_scale.unsqueeze(-1)).isnan().any()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"scope": "head"}, ValueBad, "scope: expected one of tensor, group, token, got 'head'"),
        ({"k": zeros(2, 3, 16)}, ValueBad, r"k: expected 4 dimensions .*, got \[2, 3, 16\]"),
        ({"v": zeros(2, 3, 4, 8).to(E4M3)}, TypeBad, "v: expected float16, bfloat16 or float32, got float8_e4m3fn"),
        ({"v": zeros(2, 3, 5, 8)}, ValueBad, r"v: expected \[2, 3, 4\] \(those of k\) before Dv, got \[2, 3, 5, 8\]"),
        ({"k": [1.0]}, TypeBad, "k: expected a torch.Tensor, got list"),
    ],
)
def test_quantize_kv_names_bad_input(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        nsa_sel.quantize_kv(**({"k": zeros(2, 3, 4, 8), "v": zeros(2, 3, 4, 8)} | changes))


def test_the_oracle_multiplies_by_the_scales() -> None:
    """Worked by hand: two tokens of values 2 and 4 with logits 0, scaled by 3 and 5."""
    q, k = torch.zeros(1, 1, 1, 1, 1, dtype=BF16), torch.zeros(1, 1, 2, 1).to(E4M3)
    v = torch.tensor([[[[2.0], [4.0]]]]).to(E4M3)
    spans = torch.tensor([[[[[0, 2]]]]])
    for scale, value in ((None, 3.0), (2.0, 6.0), (torch.tensor([2.0]), 6.0), (torch.tensor([[[3.0, 5.0]]]), 13.0)):
        out, _ = selection_attention_reference(q, k, v, spans, v_scale=scale)
        assert out.item() == value
    _, lse = selection_attention_reference(q + 1, k.float().add(1).to(E4M3), v, spans, k_scale=3.0)
    assert math.isclose(lse.item(), 3 + math.log(2))

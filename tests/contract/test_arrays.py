"""Arrays of other libraries: lent without a copy, right, and returned in kind; what cannot be lent is refused."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import nsa_sel
from nsa_sel import execute
from nsa_sel.testing import Inputs, assert_matches_reference
from tests.cases import case

CASES = ("dims-192x128-fp16", "dims-64x64-fp32", "dims-64x64-fp64", "blocks-seq-lens", "pages-blocks", "no-requests")
_TENSORS = ("q", "k", "v", "ranges", "block_indices", "seq_lens", "block_table")


def lend(inputs: Inputs, make: Any) -> dict[str, Any]:
    """Return the arguments of a call, `make` having turned each tensor into an array."""
    arguments = inputs.arguments(return_lse=True)
    return {n: make(value) if isinstance(value, torch.Tensor) else value for n, value in arguments.items()}


def without_bf16(name: str) -> Inputs:
    """Return the inputs of a case in a dtype that NumPy has."""
    chosen = case(name)
    return (replace(chosen, dtype=torch.float16) if chosen.dtype == torch.bfloat16 else chosen).inputs()


@pytest.fixture
def pointers(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Where the tensors of the last call lie, and its results."""
    seen: dict[str, int] = {}
    run = execute.run

    def spy(call: Any, *more: Any) -> Any:
        seen.update({name: t.data_ptr() for name in _TENSORS if (t := getattr(call, name)) is not None})
        out, lse = run(call, *more)
        seen.update(out=out.data_ptr(), lse=lse.data_ptr())
        return out, lse

    monkeypatch.setattr(execute, "run", spy)
    return seen


def numpy_address(array: np.ndarray) -> int:
    return array.ctypes.data


@pytest.mark.parametrize("name", CASES)
def test_numpy(name: str, pointers: dict[str, int]) -> None:
    inputs = without_bf16(name)
    arguments = lend(inputs, torch.Tensor.numpy)
    out, lse = nsa_sel.selection_attention(**arguments)
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}
    assert type(out) is type(lse) is np.ndarray
    assert out.flags.writeable
    addresses = {n: numpy_address(a) for n, a in (arguments | dict(out=out, lse=lse)).items() if n in pointers}
    if out.size:
        assert addresses == pointers
    assert_matches_reference(torch.from_numpy(out), torch.from_numpy(lse), inputs)


def test_numpy_views(pointers: dict[str, int]) -> None:
    inputs = case("dims-64x64-fp32").inputs()
    arguments = lend(inputs, torch.Tensor.numpy)
    arguments["k"] = np.ascontiguousarray(arguments["k"].swapaxes(1, 2)).swapaxes(1, 2)
    out, lse = nsa_sel.selection_attention(**arguments)
    assert pointers["k"] == numpy_address(arguments["k"])
    assert_matches_reference(torch.from_numpy(out), torch.from_numpy(lse), inputs)


def test_read_only_arrays_are_lent_where_torch_can(pointers: dict[str, int]) -> None:
    inputs = case("dims-64x64-fp32").inputs()
    arguments = lend(inputs, torch.Tensor.numpy)
    arguments["v"] = arguments["v"].copy()
    arguments["v"].flags.writeable = False
    if "max_version" not in inspect.signature(torch.Tensor.__dlpack__).parameters:  # DLPack before 1.0
        with pytest.raises(nsa_sel.ArgumentTypeError, match=r"v: expected an array that DLPack .*readonly"):
            nsa_sel.selection_attention(**arguments)
        return
    out, lse = nsa_sel.selection_attention(**arguments)
    assert pointers["v"] == numpy_address(arguments["v"])
    assert_matches_reference(torch.from_numpy(out), torch.from_numpy(lse), inputs)


def test_tensors_among_arrays_and_no_lse() -> None:
    inputs = without_bf16("h4")
    arguments = inputs.arguments()
    got = nsa_sel.selection_attention(**arguments | {"q": inputs.q.numpy()})
    assert isinstance(got, np.ndarray)  # q decides
    assert torch.equal(torch.from_numpy(got), nsa_sel.selection_attention(**arguments))
    with pytest.raises(nsa_sel.ArgumentTypeError, match=r"k: expected a strided torch.Tensor, got ndarray"):
        nsa_sel.selection_attention(**arguments | {"k": inputs.k.numpy()})


def test_explain_takes_arrays() -> None:
    arguments = lend(without_bf16("h4"), torch.Tensor.numpy)
    assert nsa_sel.explain(**arguments) == nsa_sel.Decision("sdpa", "tensors on cpu")


@pytest.mark.parametrize("name", ["dims-192x128-bf16", *CASES])
def test_jax(name: str, pointers: dict[str, int]) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed (the extra `test` has it)")
    with jax.enable_x64(True):
        inputs = case(name).inputs()
        arguments = lend(inputs, lambda tensor: jax.numpy.from_dlpack(tensor.clone()))
        out, lse = nsa_sel.selection_attention(**arguments)
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}
    assert isinstance(out, jax.Array)
    assert isinstance(lse, jax.Array)
    addresses = {n: a.unsafe_buffer_pointer() for n, a in (arguments | dict(out=out, lse=lse)).items() if n in pointers}
    if out.size:
        assert addresses == pointers
    assert_matches_reference(torch.from_dlpack(out), torch.from_dlpack(lse), inputs)


def test_jax_tracers_are_refused_and_a_callback_serves() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed (the extra `test` has it)")
    arguments = lend(case("h4").inputs(), jax.numpy.from_dlpack)
    tensors = {n: a for n, a in arguments.items() if isinstance(a, jax.Array)}
    others = {n: a for n, a in arguments.items() if n not in tensors}
    q = tensors.pop("q")
    with pytest.raises(nsa_sel.ArgumentTypeError, match=r"q: expected an array that DLPack can lend, got jax.*Tracer"):
        jax.jit(lambda q: nsa_sel.selection_attention(q, **tensors, **others)[0])(q)
    with pytest.raises(nsa_sel.ArgumentTypeError, match=r"q: expected an array that DLPack can lend, got jax.*Tracer"):
        jax.grad(lambda q: nsa_sel.selection_attention(q, **tensors, **others)[0].sum())(q)

    def attend(q: Any, **tensors: Any) -> Any:
        shape = jax.ShapeDtypeStruct((*q.shape[:4], tensors["v"].shape[-1]), q.dtype)
        return jax.pure_callback(lambda q, t: nsa_sel.selection_attention(q, **t), shape, q, tensors)

    got = jax.jit(attend)(q, **tensors)
    expected = nsa_sel.selection_attention(q, **tensors)
    assert (got == expected).all()


class Lender:
    """An array with no more than CuPy's interface: __dlpack__, __dlpack_device__, shape, strides."""

    __module__ = "cupy_like._core"

    def __init__(self, tensor: torch.Tensor, device: tuple[int, int] = (1, 0)) -> None:
        self._tensor, self._device = tensor, device
        self.shape = tuple(tensor.shape)
        self.strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        self.streams.append(stream)
        return self._tensor.__dlpack__(**({} if max_version is None else {"max_version": max_version}))


class OldLender(Lender):
    """The same before DLPack 1.0, as CuPy 13 and older are."""

    __module__ = "cupy_like._core"

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        self.streams.append(stream)
        return self._tensor.__dlpack__()


@pytest.fixture
def cupy_like(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("cupy_like")
    module.from_dlpack = lambda array: Lender(torch.from_dlpack(array))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy_like", module)


@pytest.mark.usefixtures("cupy_like")
@pytest.mark.parametrize("lender", [Lender, OldLender])
def test_cupy_by_its_interface(lender: type[Lender], pointers: dict[str, int]) -> None:
    inputs = case("pages-blocks").inputs()
    arguments = lend(inputs, lender)
    out, lse = nsa_sel.selection_attention(**arguments)
    assert type(out) is type(lse) is Lender
    lent = arguments | dict(out=out, lse=lse)
    assert {n: lent[n]._tensor.data_ptr() for n in pointers} == pointers
    assert_matches_reference(out._tensor, lse._tensor, inputs)


class Stream(NamedTuple):
    cuda_stream: int


@pytest.mark.usefixtures("cupy_like")
def test_the_lender_is_told_the_stream_that_will_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, CuPy makes the stream that it is told wait for its own; here a GPU's array hands over CPU memory."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(77))
    arguments = lend(case("h4").inputs(), lambda tensor: Lender(tensor, device=(2, 0)))
    nsa_sel.selection_attention(**arguments)
    assert {tuple(a.streams) for a in arguments.values() if isinstance(a, Lender)} == {(77,)}


@pytest.mark.parametrize(
    ("name", "change", "error", "text"),
    [
        ("k", lambda a: a[:, :, ::-1], nsa_sel.ArgumentError, r"k: expected strides >= 0, got \[.*-256.*\] bytes"),
        (
            "k",
            lambda a: a.astype(">f4"),
            nsa_sel.ArgumentTypeError,
            "k: expected an array that DLPack can lend, got nu",
        ),
        (
            "q",
            lambda a: a.astype(object),
            nsa_sel.ArgumentTypeError,
            "q: expected an array that DLPack can lend, got n",
        ),
        ("v", lambda a: a.astype(np.float64), nsa_sel.ArgumentTypeError, "v: expected float32 .*, got float64"),
        ("ranges", lambda a: a.astype(np.uint32), nsa_sel.ArgumentTypeError, "ranges: expected int32 or int64"),
        ("q", lambda a: a[0], nsa_sel.ArgumentError, r"q: expected .*\[B, S, G, h, Dk\], got float32 \[1, 2, 4, 64\]"),
        ("q", lambda a: a.tolist(), nsa_sel.ArgumentTypeError, "q: expected a strided torch.Tensor, got list"),
    ],
)
def test_what_cannot_be_lent_is_refused(name: str, change: Any, error: type[Exception], text: str) -> None:
    arguments = lend(case("dims-64x64-fp32").inputs(), torch.Tensor.numpy)
    with pytest.raises(error, match=text):
        nsa_sel.selection_attention(**arguments | {name: change(arguments[name])})
    with pytest.raises(error, match=text):
        nsa_sel.explain(**arguments | {name: change(arguments[name])})


def test_out_is_for_tensors() -> None:
    arguments = lend(case("dims-64x64-fp32").inputs(), torch.Tensor.numpy)
    out = np.zeros((*arguments["q"].shape[:4], arguments["v"].shape[-1]), np.float32)
    with pytest.raises(nsa_sel.ArgumentTypeError, match=r"out: expected None where q is a numpy.ndarray, got one"):
        nsa_sel.selection_attention(**arguments, out=out)

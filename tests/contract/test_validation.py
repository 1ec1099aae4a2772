"""Every bad input is answered by an error that names the argument, what was expected and what came."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import nsa_sel
from nsa_sel.check import check


def good(**changes: Any) -> dict[str, Any]:
    """A call that is right (B=2, S=1, G=3, h=4, Dk=16, Dv=8, S_kv=32, n=5), with some arguments changed."""
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 3, 4, 16),
        "k": torch.zeros(2, 3, 32, 16),
        "v": torch.zeros(2, 3, 32, 8),
        "ranges": torch.zeros(2, 1, 3, 5, 2, dtype=torch.int32),
    }
    return arguments | changes


def blocks(**changes: Any) -> dict[str, Any]:
    """The same call by blocks."""
    ids = torch.zeros(2, 1, 3, 5, dtype=torch.int32)
    return good(ranges=None, block_indices=ids, block_size=4) | changes


def paged(**changes: Any) -> dict[str, Any]:
    """The same call on a paged cache of 7 pages of 8 tokens."""
    table = torch.zeros(2, 4, dtype=torch.int32)
    return good(k=torch.zeros(7, 3, 8, 16), v=torch.zeros(7, 3, 8, 8), block_table=table) | changes


ValueBad, TypeBad, GradBad = nsa_sel.ArgumentError, nsa_sel.ArgumentTypeError, nsa_sel.AutogradError
Z, M = torch.zeros, "meta"
I16, I32, I64, BOOL = torch.int16, torch.int32, torch.int64, torch.bool
F16, BF16, C64 = torch.float16, torch.bfloat16, torch.complex64
HUGE = torch.empty_strided((0, 3, 2**61, 16), (0, 0, 0, 1))  # pages that hold more tokens than 64 bits can add up
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("q-rank", good(q=Z(2, 3, 4, 16)), ValueBad, r"q: expected .*\[B, S, G, h, Dk\], got float32 \[2, 3, 4, 16\]"),
    ("q-dtype", good(q=Z(2, 1, 3, 4, 16, dtype=I32)), TypeBad, r"q: expected float16 .*, got int32"),
    ("q-complex", good(q=Z(2, 1, 3, 4, 16, dtype=C64)), TypeBad, r"q: expected .*, got complex64"),
    ("q-list", good(q=[[1.0]]), TypeBad, r"q: .*strided torch\.Tensor, got list"),
    ("q-list", good(q=[[1.0]]), TypeBad, r"q: .*strided torch\.Tensor, got list"),
    ("k-numpy", good(k=np.zeros((2, 3, 32, 16))), TypeBad, r"k: .*strided torch\.Tensor, got ndarray"),
    ("q-sparse", good(q=Z(2, 1, 3, 4, 16).to_sparse()), TypeBad, r"q: .*strided torch\.Tensor, got layout"),
    ("q-no-heads", good(q=Z(2, 1, 3, 0, 16)), ValueBad, r"q: expected .* h >= 1"),
    ("q-stride", good(q=Z(2, 1, 3, 16, 4).transpose(3, 4)), ValueBad, r"q: expected a contiguous.*got strides"),
    ("k-rank", good(k=Z(3, 32, 16)), ValueBad,
     r"k: expected float32 \[B=2, G=3, S_kv, Dk=16\], got float32 \[3, 32, 16\]"),
    ("k-batch", good(k=Z(1, 3, 32, 16)), ValueBad, r"k: expected .*B=2.*got float32 \[1, 3, 32, 16\]"),
    ("k-groups", good(k=Z(2, 2, 32, 16)), ValueBad, r"k: expected .*G=3"),
    ("k-dk", good(k=Z(2, 3, 32, 8)), ValueBad, r"k: expected .*Dk=16"),
    ("k-mixed-dtype", good(k=Z(2, 3, 32, 16, dtype=F16)), TypeBad, r"k: expected float32.*, got float16"),
    ("k-none", good(k=None), TypeBad, r"k: .*strided torch\.Tensor, got NoneType"),
    ("k-stride", good(k=Z(2, 3, 16, 32).transpose(2, 3)), ValueBad, r"k: expected a contiguous"),
    ("k-device", good(k=Z(2, 3, 32, 16, device=M)), ValueBad, r"k: expected device cpu .*, got meta"),
    ("v-tokens", good(v=Z(2, 3, 31, 8)), ValueBad, r"v: expected float32 \[B=2, G=3, S_kv=32, Dv\], got"),
    ("v-mixed-dtype", good(v=Z(2, 3, 32, 8, dtype=BF16)), TypeBad, r"v: expected float32.*got bfloat16"),
    ("v-stride", good(v=Z(2, 3, 32, 1).expand(2, 3, 32, 8)), ValueBad, r"v: expected a contiguous"),
    ("v-empty", good(v=Z(2, 3, 32, 0)), ValueBad, r"v: expected .*Dv >= 1"),
    ("ranges-dtype", good(ranges=Z(2, 1, 3, 5, 2)), TypeBad,
     r"ranges: expected int32 or int64 \[B=2, S=1, G=3, n, 2\], got float32 \[2, 1, 3, 5, 2\]"),
    ("ranges-int16", good(ranges=Z(2, 1, 3, 5, 2, dtype=I16)), TypeBad, r"ranges: .*got int16"),
    ("ranges-bool", good(ranges=Z(2, 1, 3, 5, 2, dtype=BOOL)), TypeBad, r"ranges: .*got bool"),
    ("ranges-rank", good(ranges=Z(2, 1, 3, 10, dtype=I32)), ValueBad, r"ranges: .*got int32 \[2, 1, 3, 10\]"),
    ("ranges-pairs", good(ranges=Z(2, 1, 3, 5, 3, dtype=I32)), ValueBad, r"ranges: .*n, 2\], got"),
    ("ranges-groups", good(ranges=Z(2, 1, 4, 5, 2, dtype=I32)), ValueBad, r"ranges: .*G=3"),
    ("ranges-list", good(ranges=[[0, 5]]), TypeBad, r"ranges: .*strided torch\.Tensor, got list"),
    ("ranges-stride", good(ranges=Z(2, 1, 3, 2, 5, dtype=I32).mT), ValueBad, r"ranges: expected a contiguous"),
    ("ranges-device", good(ranges=Z(2, 1, 3, 5, 2, dtype=I32, device=M)), ValueBad, r"ranges: .*device"),
    ("neither", good(ranges=None), ValueBad, r"ranges, block_indices: expected exactly one of them, got neither"),
    ("both", blocks(ranges=good()["ranges"]), ValueBad,
     r"ranges, block_indices: expected exactly one of them, got both"),
    ("block-size-with-ranges", good(block_size=4), ValueBad, r"block_size: expected None with ranges, got 4"),
    ("block-size-missing", blocks(block_size=None), TypeBad, r"block_size: expected an int >= 1 .*, got None"),
    ("block-size-zero", blocks(block_size=0), ValueBad, r"block_size: expected an int >= 1 .*, got 0"),
    ("block-size-negative", blocks(block_size=-64), ValueBad, r"block_size: .*got -64"),
    ("block-size-float", blocks(block_size=64.0), TypeBad, r"block_size: .*got float 64\.0"),
    ("block-size-bool", blocks(block_size=True), TypeBad, r"block_size: .*got bool True"),
    ("block-indices-dtype", blocks(block_indices=Z(2, 1, 3, 5)), TypeBad, r"block_indices: .*got float32"),
    ("block-indices-rank", blocks(block_indices=Z(2, 3, 5, dtype=I32)), ValueBad, r"block_indices: expected"),
    ("seq-lens-float", good(seq_lens=torch.ones(2)), TypeBad, r"seq_lens: expected int32 \[B=2\], got float32 \[2\]"),
    ("seq-lens-int64", good(seq_lens=torch.ones(2, dtype=I64)), TypeBad, r"seq_lens: expected int32 .*got int64"),
    ("seq-lens-shape", good(seq_lens=torch.ones(3, dtype=I32)), ValueBad,
     r"seq_lens: expected int32 \[B=2\], got int32 \[3\]"),
    ("seq-lens-list", good(seq_lens=[1, 2]), TypeBad, r"seq_lens: .*strided torch\.Tensor, got list"),
    ("seq-lens-int", good(seq_lens=7), TypeBad, r"seq_lens: .*got int"),
    ("table-dtype", paged(block_table=Z(2, 4, dtype=I64)), TypeBad, r"block_table: expected int32 .*got int64"),
    ("table-shape", paged(block_table=Z(4, dtype=I32)), ValueBad, r"block_table: .*\[B=2, max_pages\], got"),
    ("table-batch", paged(block_table=Z(3, 4, dtype=I32)), ValueBad, r"block_table: .*\[B=2, max_pages\], got"),
    ("table-huge", paged(k=HUGE, v=HUGE), ValueBad, r"block_table: .*<= 2\^62 tokens, got 9223372036854775808"),
    ("rows-dtype", paged(table_rows=Z(2, dtype=I64)), TypeBad, r"table_rows: expected int32 \[B=2\], got int64"),
    ("rows-shape", paged(table_rows=Z(3, dtype=I32)), ValueBad, r"table_rows: expected int32 \[B=2\], got int32 \[3\]"),
    ("rows-alone", good(table_rows=Z(2, dtype=I32)), ValueBad, r"table_rows: expected a block_table with it, got none"),
    ("rows-table", paged(table_rows=Z(2, dtype=I32), block_table=Z(4, dtype=I32)), ValueBad,
     r"block_table: .*\[R, max_pages\], got"),
    ("rows-device", paged(table_rows=Z(2, dtype=I32, device=M)), ValueBad, r"table_rows: expected device cpu"),
    ("counts-dtype", good(counts=Z(2, 1, 3, dtype=I64)), TypeBad, r"counts: expected int32 \[B=2, S=1, G=3\], got"),
    ("counts-shape", good(counts=Z(2, 3, dtype=I32)), ValueBad, r"counts: expected int32 \[B=2, S=1, G=3\], got"),
    ("counts-list", good(counts=[1]), TypeBad, r"counts: .*strided torch\.Tensor, got list"),
    ("table-stride", paged(block_table=Z(4, 2, dtype=I32).T), ValueBad, r"block_table: expected a contiguous"),
    ("paged-v-pages", paged(v=Z(6, 3, 8, 8)), ValueBad, r"v: expected float32 \[P=7, G=3, page_size=8, Dv\], got"),
    ("paged-k-groups", paged(k=Z(7, 2, 8, 16)), ValueBad, r"k: expected float32 \[P, G=3, page_size, Dk=16\]"),
    ("paged-no-page-size", paged(k=Z(7, 3, 0, 16), v=Z(7, 3, 0, 8)), ValueBad, r"k: .*page_size >= 1"),
    ("max-selected", good(max_selected=-1), ValueBad, r"max_selected: expected an int >= 0 or None, got -1"),
    ("max-selected-float", good(max_selected=1.5), TypeBad, r"max_selected: .*got float 1\.5"),
    ("max-selected-tensor", good(max_selected=torch.tensor(3)), TypeBad, r"max_selected: .*got Tensor"),
    ("scale-nan", good(softmax_scale=math.nan), ValueBad, r"softmax_scale: expected a finite float or None, got nan"),
    ("scale-inf", good(softmax_scale=-math.inf), ValueBad, r"softmax_scale: .*got -inf"),
    ("scale-text", good(softmax_scale="1"), TypeBad, r"softmax_scale: .*got str '1'"),
    ("scale-tensor", good(softmax_scale=torch.tensor(1.0)), TypeBad, r"softmax_scale: .*got Tensor"),
    ("causal", good(causal=1), TypeBad, r"causal: expected a bool, got int 1"),
    ("return-lse", good(return_lse=None), TypeBad, r"return_lse: expected a bool, got NoneType"),
    ("batch-invariant", good(batch_invariant="yes"), TypeBad, r"batch_invariant: expected a bool, got str"),
    ("out-shape", good(out=Z(2, 1, 3, 4, 16)), ValueBad, r"out: expected float32 \[B=2, S=1, G=3, h=4, Dv=8\], got"),
    ("out-dtype", good(out=Z(2, 1, 3, 4, 8, dtype=F16)), TypeBad, r"out: expected float32.*got float16"),
    ("out-list", good(out=[0.0]), TypeBad, r"out: .*strided torch\.Tensor, got list"),
    ("out-device", good(out=Z(2, 1, 3, 4, 8, device=M)), ValueBad, r"out: expected device cpu"),
    ("out-stride", good(out=Z(2, 1, 3, 8, 4).mT), ValueBad, r"out: expected a contiguous"),
    ("out-shared", good(out=Z(1, 1, 3, 4, 8).expand(2, 1, 3, 4, 8)), ValueBad, r"out: expected memory of its own"),
    ("out-gradient", good(out=Z(2, 1, 3, 4, 8, requires_grad=True)), GradBad, r"out: .*gradients"),
    ("gradient-out", good(q=Z(2, 1, 3, 4, 16, requires_grad=True), out=Z(2, 1, 3, 4, 8)),
     GradBad, r"out: .*gradients"),
    ("backend", good(backend="fast"), ValueBad, r"backend: expected one of auto, cuda, triton, sdpa, got 'fast'"),
    ("backend-none", good(backend=None), TypeBad, r"backend: expected one of .*, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize("function", [nsa_sel.selection_attention, nsa_sel.explain], ids=["call", "explain"])
@pytest.mark.parametrize(("arguments", "error", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_named(function: Any, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        function(**arguments)
    assert re.search(text, str(caught.value)), str(caught.value)
    assert isinstance(caught.value, (ValueError, TypeError, RuntimeError))
    assert nsa_sel.stats() == {}, "a call with bad input ran"


@pytest.mark.parametrize(
    "arguments",
    [
        good(),
        blocks(),
        paged(),
        good(causal=False, softmax_scale=0, max_selected=0),
        good(softmax_scale=np.float32(0.5), max_selected=np.int64(3)),
        good(seq_lens=torch.tensor([5, 6], dtype=torch.int32)),
        good(q=torch.zeros(2, 1, 4, 3, 16).transpose(2, 3), k=torch.zeros(2, 32, 3, 16).transpose(1, 2)),
        good(ranges=torch.zeros(1, 1, 1, 1, 2, dtype=torch.int64).expand(2, 1, 3, 5, 2)),
        blocks(block_indices=torch.zeros(2, 1, 5, 3, dtype=torch.int64).mT),
        good(seq_lens=torch.zeros(1, dtype=torch.int32).expand(2)),
        good(out=torch.zeros(2, 1, 4, 3, 8).transpose(2, 3)),
        good(k=torch.zeros(2, 1, 1, 16).expand(2, 3, 32, 16)),
    ],
    ids=lambda arguments: ",".join(name for name in arguments if name not in ("q", "v")),
)
def test_good_input_passes(arguments: dict[str, Any]) -> None:
    assert nsa_sel.selection_attention(**arguments).shape == (2, 1, 3, 4, 8)


def test_out_is_not_touched_where_gradients_are_off() -> None:
    with torch.no_grad():
        q = torch.zeros(2, 1, 3, 4, 16, requires_grad=True)
        out = torch.ones(2, 1, 3, 4, 8)
        assert nsa_sel.selection_attention(**good(q=q, out=out)) is out
    assert not out.any()


def test_the_call_says_what_was_asked() -> None:
    call = check(**paged(ranges=None, block_indices=torch.zeros(2, 1, 3, 5, dtype=torch.int64), block_size=8))
    assert (call.B, call.S, call.G, call.h, call.Dk, call.Dv, call.S_kv, call.n) == (2, 1, 3, 4, 16, 8, 32, 5)
    assert (call.dtype, call.device_type, call.rows) == ("float32", "cpu", 6)
    assert (call.paged, call.page_size, call.num_pages) == (True, 8, 7)
    assert call.selection is call.block_indices
    assert check(**good()).scale == 0.25


@pytest.mark.parametrize(
    ("arguments", "block_size", "bound", "largest"),
    [
        (good(), 0, None, 5 * 32),
        (good(max_selected=7), 0, 7, 5 * 32),
        (good(max_selected=10**30), 0, 5 * 32, 5 * 32),
        (blocks(block_size=8), 8, 40, 40),
        (blocks(block_size=8, max_selected=7), 8, 7, 40),
        (blocks(block_size=8, max_selected=41), 8, 40, 40),
        (blocks(block_size=1000), 32, 5 * 32, 5 * 32),  # a block holds no more than the cache
        (blocks(block_size=2**70), 32, 5 * 32, 5 * 32),
        (blocks(block_size=9, k=torch.zeros(2, 3, 0, 16), v=torch.zeros(2, 3, 0, 8)), 1, 5, 5),
    ],
)
def test_bounds(arguments: dict[str, Any], block_size: int, bound: int | None, largest: int) -> None:
    call = check(**arguments)
    assert (call.block_size, call.max_selected, call.largest) == (block_size, bound, largest)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("aligned", torch.zeros(1, 1, 2, 4, 64, dtype=torch.float16), None),
        ("base", torch.zeros(8 * 64 + 1, dtype=torch.float16)[1:].view(1, 1, 2, 4, 64), "base address"),
        ("stride", torch.zeros(1, 1, 2, 4, 68, dtype=torch.float16)[..., :64], "strides"),
        (
            "stride-of-one",
            torch.zeros(4 * 72, dtype=torch.float16).as_strided((1, 1, 1, 4, 64), (3, 5, 7, 72, 1)),
            None,
        ),
        ("expanded", torch.zeros(1, 1, 1, 1, 64, dtype=torch.float16).expand(1, 1, 2, 4, 64), None),
    ],
)
def test_sixteen_bytes(name: str, tensor: torch.Tensor, expected: str | None) -> None:
    aligned = torch.zeros(1, 2, 4, 64, dtype=torch.float16)
    got = replace(check(**good()), q=tensor, k=aligned, v=aligned).misaligned()
    assert (got is None) == (expected is None), got
    if expected is not None:
        assert got is not None
        assert got.startswith("q: expected")
        assert expected in got


def test_misaligned_strides_are_named_for_a_forced_kernel_before_anything_runs() -> None:
    """On a machine without a GPU the tensors' place comes first; routing has the rest (test_routing.py)."""
    wide = torch.zeros(2, 3, 32, 68, dtype=torch.float16)[..., :64]
    arguments = good(q=torch.zeros(2, 1, 3, 4, 64, dtype=torch.float16), k=wide, v=wide)
    with pytest.raises(nsa_sel.BackendError, match="tensors on cpu"):
        nsa_sel.selection_attention(**arguments, backend="cuda")


def test_the_public_function_and_its_check_take_the_same_arguments_in_the_same_order() -> None:
    public = list(inspect.signature(nsa_sel.selection_attention).parameters)
    assert public == [*inspect.signature(check).parameters, "backend"]

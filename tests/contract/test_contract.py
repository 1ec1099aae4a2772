"""What the contract promises beyond single results, on every backend that this machine has."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
from dataclasses import replace

import pytest
import torch

import nsa_sel
from nsa_sel.testing import Inputs, assert_matches_reference, make_inputs
from tests.backends_under_test import BACKENDS, BackendUnderTest
from tests.cases import Case, blocks, case, fixed, spans

# what this machine lacks is skipped by name in test_parity.py
PRESENT = [pytest.param(b, id=b.name) for b in BACKENDS if b.missing() is None]
on_every_backend = pytest.mark.parametrize("backend", PRESENT)


def on_every_backend_that_takes(name: str, cases: list[Case]) -> pytest.MarkDecorator:
    """Pair backends and cases: what a backend cannot take is left out here, for on a GPU a skip is a failure."""
    pairs = [
        pytest.param(p.values[0], case, id=f"{p.id}-{case.name}")
        for p in PRESENT
        for case in cases
        if p.values[0].cannot(case) is None
    ]
    return pytest.mark.parametrize(("backend", name), pairs)


def test_signature() -> None:
    expected = (
        "q, k, v, ranges, *, block_indices, block_size, counts, seq_lens, block_table, table_rows, causal, "
        "k_scale, v_scale, max_selected, softmax_scale, return_lse, batch_invariant, out, backend"
    )
    for function in (nsa_sel.selection_attention, nsa_sel.explain):
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert ", ".join([*positional, "*", *keywords]) == expected
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        switched = {"causal": True, "return_lse": False, "batch_invariant": False, "backend": "auto"}
        assert defaults == dict.fromkeys([*positional[3:], *keywords]) | switched


def test_errors_derive_from_builtin_ones() -> None:
    for name in ("ArgumentError", "ArgumentTypeError", "AutogradError", "BackendError", "KernelLaunchError",
                 "PolicyError", "SwitchError"):  # fmt: skip
        assert issubclass(getattr(nsa_sel, name), (ValueError, TypeError, RuntimeError))


@pytest.mark.parametrize(
    "module",
    [
        "nsa_sel",
        *(f"nsa_sel.{m}" for m in ("_build", "api", "quantize", "ranges", "reference", "routing", "stats", "switches")),
    ],
)
def test_examples_of_the_docstrings(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert failed == 0
    assert tried > 0


def run_alone(backend: BackendUnderTest, inputs: Inputs, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = backend.run(inputs, **options)
    return out.cpu(), lse.cpu()


@on_every_backend
def test_empty_rows_are_exactly_zero(backend: BackendUnderTest) -> None:
    inputs = case("empty-rows").inputs()
    out, lse = run_alone(backend, inputs)
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert (lse[:, :, 0] == -math.inf).all()
    assert torch.isfinite(out[:, :, 1]).all()


@on_every_backend
@pytest.mark.parametrize("name", ["no-slots", "no-tokens", "no-requests", "no-queries", "blocks-all-unused"])
def test_nothing_to_do_is_no_error(backend: BackendUnderTest, name: str) -> None:
    inputs = case(name).inputs()
    out, lse = run_alone(backend, inputs)
    assert out.shape == (*inputs.q.shape[:4], inputs.v.shape[-1])
    assert not out.any()
    assert (lse == -math.inf).all()


@on_every_backend
def test_no_physical_pages(backend: BackendUnderTest) -> None:
    inputs = case("pages-16").inputs()
    inputs = replace(inputs, k=inputs.k[:0], v=inputs.v[:0])
    out, lse = run_alone(backend, inputs)
    assert not out.any()
    assert (lse == -math.inf).all()


@on_every_backend
def test_tokens_of_missing_pages_are_not_selected(backend: BackendUnderTest) -> None:
    inputs = case("pages-16").inputs()
    assert inputs.block_table is not None
    table = inputs.block_table.clone()
    table[0, 3], table[0, 7], table[1, 0] = -1, inputs.k.shape[0], 2**31 - 1
    broken = replace(inputs, block_table=table)
    assert [len(broken.tokens(r)) for r in broken.rows()] != [len(inputs.tokens(r)) for r in inputs.rows()]
    out, lse = run_alone(backend, broken)
    assert_matches_reference(out, lse, broken)


@on_every_backend
def test_every_page_missing(backend: BackendUnderTest) -> None:
    inputs = case("pages-16").inputs()
    inputs = replace(inputs, block_table=torch.full_like(inputs.block_table, -1))
    out, lse = run_alone(backend, inputs)
    assert not out.any()
    assert (lse == -math.inf).all()


@on_every_backend
@pytest.mark.parametrize("name", ["h4", "blocks-64", "pages-packed", "draft-causal", "rows-of-very-different-length"])
def test_two_runs_give_the_same_bits(backend: BackendUnderTest, name: str) -> None:
    inputs = case(name).inputs()
    first, second = run_alone(backend, inputs), run_alone(backend, inputs)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


LSE = [
    case("blocks-64"),
    # of a length and number where memory for lse, if it were planned for, would cut the rows otherwise
    Case(
        "uneven",
        fixed([[[0, 500]], [[3, 166]], [[0, 0]], [[7, 270]]]),
        B=8,
        G=1,
        h=1,
        Dk=128,
        Dv=128,
        S_kv=500,
        dtype=torch.float32,
        causal=False,
    ),
]


@on_every_backend_that_takes("chosen", LSE)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_asking_for_lse_does_not_change_out(backend: BackendUnderTest, chosen: Case, batch_invariant: bool) -> None:
    inputs = chosen.inputs()
    out, nothing = backend.run(inputs, return_lse=False, batch_invariant=batch_invariant)
    assert nothing is None
    assert torch.equal(out.cpu(), run_alone(backend, inputs, batch_invariant=batch_invariant)[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, under Triton's interpreter
@on_every_backend
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 64, 200])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_one_infinite_logit(backend: BackendUnderTest, value: float, tokens: int, batch_invariant: bool) -> None:
    """lse is that of torch.logsumexp; out is NaN as softmax makes it, and 0 where no token has any weight."""
    other = tokens // 2 + 1
    inputs = Case("", fixed([[[0, tokens]], [[40, 40 + other]]]), B=2, G=1, h=2, n=1).inputs()
    inputs.q[..., 0] = 1
    inputs.k[0, 0, 0, 0] = value
    out, lse = run_alone(backend, inputs, batch_invariant=batch_invariant)
    logits = inputs.q[0, 0, 0].double() @ inputs.k[0, 0, :tokens].double().T / 8
    torch.testing.assert_close(lse[0, 0, 0].double(), torch.logsumexp(logits, -1), rtol=1e-5, atol=1e-5)
    assert_matches_reference(out, lse, inputs)
    if value == math.inf:
        assert out[0].isnan().all()
    elif tokens == 1:
        assert not out[0].any()


@on_every_backend
@pytest.mark.parametrize("name", ["h4", "blocks-64", "pages-64"])
@pytest.mark.parametrize("promise", [0, 1, 70])
def test_a_broken_promise_costs_time_and_not_correctness(backend: BackendUnderTest, name: str, promise: int) -> None:
    inputs = case(name).inputs()
    assert max(len(inputs.tokens(row)) for row in inputs.rows()) > promise
    out, lse = run_alone(backend, inputs, max_selected=promise)
    assert_matches_reference(out, lse, inputs)


# The kernel writes 8 bytes at a time; its backend stages an out that is off them, and the emulator has none.
@pytest.mark.parametrize(
    ("backend", "offset"),
    [
        pytest.param(p.values[0], offset, id=f"{p.id}-{offset}")
        for p in PRESENT
        for offset in (3, 4)
        if offset % 4 == 0 or not str(p.id).startswith("host-run")
    ],
)
def test_garbage_in_out_does_not_survive(backend: BackendUnderTest, offset: int) -> None:
    inputs = case("empty-rows").inputs()
    wide = torch.full((2, 1, 4, 2, 100), math.nan, dtype=torch.bfloat16, device=backend.device)
    out = wide.transpose(2, 3)[..., offset : offset + 64]  # [B, S, G, h, Dv]
    got, lse = backend.run(inputs, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert_matches_reference(out.cpu(), lse, inputs)
    assert wide[..., :offset].isnan().all(), "wrote in front of out"
    assert wide[..., offset + 64 :].isnan().all(), "wrote behind out"


@on_every_backend
def test_caches_are_neither_written_nor_read_outside(backend: BackendUnderTest) -> None:
    """The views end right before NaN on every side, so one element too far would show."""
    inputs = make_inputs(ranges=torch.tensor([[[[[0, 32]], [[0, 32]]]]]), S_kv=32)
    k = torch.full((3, 4, 40, 192), math.nan, dtype=torch.bfloat16)[1:2, 1:3, 4:36, 64:128]
    v = torch.full((3, 4, 40, 192), math.nan, dtype=torch.bfloat16)[1:2, 1:3, 4:36, 64:128]
    k.copy_(inputs.k)
    v.copy_(inputs.v)
    inputs = replace(inputs, k=k, v=v)
    out, lse = run_alone(backend, inputs)
    assert_matches_reference(out, lse, inputs)
    assert not out.isnan().any()


INVARIANT = [
    Case("spans", spans(90), B=64, G=1, h=4, S_kv=128, n=2, seed=40),
    Case("blocks", blocks(), B=64, G=1, h=16, Dk=192, Dv=128, S_kv=256, n=3, block_size=32, seed=41),
    Case("fp32", spans(90), B=64, G=1, h=3, Dk=24, Dv=40, S_kv=128, n=2, seed=42, dtype=torch.float32),
]


@on_every_backend_that_takes("batch", INVARIANT)
def test_batch_invariant_rows_keep_their_bits(backend: BackendUnderTest, batch: Case) -> None:
    """Alone, in a batch of 64, reordered, and beside a row that is far longer."""
    inputs = batch.inputs()
    out, lse = run_alone(backend, inputs, batch_invariant=True)
    assert_matches_reference(out, lse, inputs)

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for chosen in ([5], [63, 0, 5], order.tolist()):
        some = _requests(inputs, chosen)
        part, part_lse = run_alone(backend, some, batch_invariant=True)
        assert torch.equal(part, out[chosen]), f"requests {chosen}: other bits than in the batch of 64"
        assert torch.equal(part_lse, lse[chosen])


def _requests(inputs: Inputs, chosen: list[int]) -> Inputs:
    def take(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[chosen]

    assert inputs.block_table is None
    return replace(
        inputs, q=inputs.q[chosen], k=inputs.k[chosen], v=inputs.v[chosen], ranges=take(inputs.ranges),
        block_indices=take(inputs.block_indices), seq_lens=take(inputs.seq_lens),
    )  # fmt: skip


@on_every_backend
def test_all_selected_tokens_are_visible_to_one_query(backend: BackendUnderTest) -> None:
    """`is_causal` on one query would attend to the first token alone."""
    inputs = Case("", fixed([[[0, 64]]]), G=1, S_kv=64).inputs()
    out, lse = run_alone(backend, inputs)
    logits = inputs.q[0, 0, 0].double() @ inputs.k[0, 0].double().T / 8
    torch.testing.assert_close(lse[0, 0, 0].double(), torch.logsumexp(logits, -1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[0, 0, 0], inputs.v[0, 0, 0].expand(4, 64), atol=0.1)


@on_every_backend
def test_selected_nan_and_inf_show(backend: BackendUnderTest) -> None:
    """Poison is not swallowed where it was selected: only then does its absence elsewhere prove anything."""
    inputs = case("h4").inputs()
    row = max(inputs.rows(), key=lambda r: len(inputs.tokens(r)))
    token = inputs.tokens(row)[-1]
    inputs.v[row[0], row[2], token, 5] = math.inf
    inputs.v[row[0], row[2], token, 6] = math.nan
    out, lse = run_alone(backend, inputs)
    assert_matches_reference(out, lse, inputs)
    assert out.isinf().any()
    assert out.isnan().any()

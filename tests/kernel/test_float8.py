"""A float8 cache on the emulator: every code by value, scales that hurt, every byte once and no bank conflicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_sel.reference import selection_attention_reference
from nsa_sel.testing import Inputs, assert_matches_reference
from tests import codes, host_run
from tests.cases import HALF, KERNEL_DIMS, case
from tests.host_run import Device, HostRun, Options, mutation

DEVICES = {"sm80": Device(), "sm90": mutation.H200}
HOSTILE = torch.tensor([0.0, 1e-30, 1e30, 1.0, -1.0])


def run(arguments: dict[str, Any], device: Device | None = None, **more: Any) -> HostRun:
    result = host_run.selection_attention(**arguments, options=Options(device=device or Device()), **more)
    assert result.findings == []
    return result


@pytest.mark.parametrize("dims", KERNEL_DIMS, ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_every_code_in_every_column(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    call, expected = codes.values(dtype, *dims)
    assert torch.equal(run(call).out.double().nan_to_num(-1e9), expected.nan_to_num(-1e9))
    call, expected = codes.keys(dtype, *dims)
    lse = run(call).lse
    assert lse is not None
    torch.testing.assert_close(lse.double(), expected, rtol=2e-7, atol=0)  # through base 2 and back
    call, _ = codes.nan_keys(dtype, *dims)
    assert run(call).out.isnan().all()


@pytest.mark.parametrize("dims", KERNEL_DIMS, ids=str)
@pytest.mark.parametrize("h", [1, 16, 20, 64])
def test_every_selected_byte_and_scale_once_and_no_conflicts(h: int, dims: tuple[int, int]) -> None:
    inputs = replace(case("fp8-token"), h=h, Dk=dims[0], Dv=dims[1], kv_scope="token", S_kv=512, n=5).inputs()
    counters = run(inputs.arguments(return_lse=True)).counters
    tokens = sum(len(inputs.tokens(row)) for row in inputs.rows())
    for name, D in zip(("k", "v"), dims, strict=True):
        traffic = counters["buffers"][name]
        assert traffic.bytes_read == tokens * D
        assert traffic.read_widths == {16: tokens * D // 16}
        assert traffic.sectors_read * 32 <= traffic.bytes_read  # less where lanes meet in one
        assert counters["buffers"][f"{name}_scale"].read_widths == {4: tokens}
    for op in ("LDS", "STS", "LDSM", "LDGSTS_ST"):
        assert counters["ops"][op].requests > 0
        assert counters["ops"][op].conflicts == 0, (op, [s for s in counters["sites"].items() if s[1].conflicts])


def with_scales(inputs: Inputs, pool: torch.Tensor, seed: int) -> Inputs:
    """Give the tokens that are selected factors of `pool`; all others keep NaN."""
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    for name in ("k_scale", "v_scale"):
        old = getattr(inputs, name)
        scales[name] = torch.where(old.isnan(), old, pool[torch.randint(len(pool), old.shape, generator=generator)])
    return replace(
        inputs, softmax_scale=inputs.q.shape[-1] ** -0.5, **scales
    )  # given: then no error is bounded absolutely


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp8-token", "fp8-pages-token", "fp8-L-4096"])
def test_factors_of_tokens_far_apart(name: str, device: str) -> None:
    for seed in range(4):
        inputs = with_scales(case(name).inputs(), HOSTILE, seed)
        result = run(inputs.arguments(return_lse=True), DEVICES[device], num_splits=1 + 2 * (seed % 2))
        assert_matches_reference(result.out, result.lse, inputs)


@pytest.mark.parametrize("step", [1e-6, 1e-3, 30.0])
def test_fp16_keeps_its_digits_with_small_and_large_factors(step: float) -> None:
    chosen = replace(case("fp8-L-4096"), dtype=torch.float16)
    inputs = with_scales(chosen.inputs(), step * torch.tensor([0.25, 0.5, 1.0]), 0)
    inputs = replace(inputs, k_scale=inputs.k_scale * 0 + 0.01)
    result = run(inputs.arguments(return_lse=True))
    # PyTorch's own computation in fp16 is no yardstick: it rounds the scaled values, which the kernel never has.
    wide = replace(inputs, q=inputs.q.double())
    expected, _ = selection_attention_reference(**wide.arguments())
    error = (result.out.double() - expected).abs().max()
    smallest = 2.0**-24 if step < 1e-4 else 0.0
    assert error <= 2e-3 * expected.abs().max() + smallest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_a_group_whose_factor_is_nan_or_zero(value: float, device: str) -> None:
    inputs = case("fp8-group").inputs()
    factors = inputs.v_scale.clone()
    factors[0] = value
    for num_splits in (1, 3):
        result = run(
            replace(inputs, v_scale=factors).arguments(return_lse=True), DEVICES[device], num_splits=num_splits
        )
        assert result.out[:, :, 1:].isfinite().all()
        assert (result.out[:, :, 0].isnan() if value != value else result.out[:, :, 0] == 0).all()

"""A float8 cache on the machine code: every code by value, scales of every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_sel.testing import assert_matches_reference
from tests import codes
from tests.cases import HALF, KERNEL_DIMS, case
from tests.machine_code import selection_attention
from tests.machine_code.test_values import ARCHS, CUTS

SAMPLE = ("fp8-none", "fp8-tensor", "fp8-h17", "fp8-empty-rows", "fp8-hostile-int64", "fp8-nsa-paper-short",
          "fp8-pages-group", "fp8-pages-token", "fp8-packed", "fp8-dims-192x128-fp16-token")  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", HALF)
def test_every_code_is_widened_exactly(dtype: torch.dtype, arch: str) -> None:
    call, expected = codes.values(dtype, 128, 128)
    assert torch.equal(selection_attention(**call, arch=arch).out.double().nan_to_num(-1e9), expected.nan_to_num(-1e9))
    call, expected = codes.keys(dtype, 128, 128)
    lse = selection_attention(**call, arch=arch).lse
    assert lse is not None
    torch.testing.assert_close(lse.double(), expected, rtol=2e-7, atol=0)  # through base 2 and back
    call, expected = codes.nan_keys(dtype, 128, 128)
    assert selection_attention(**call, arch=arch).out.isnan().all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SAMPLE)
def test_cases_of_the_common_suite(name: str, arch: str) -> None:
    inputs = case(name).inputs()
    result = selection_attention(**inputs.arguments(return_lse=True), arch=arch)
    assert_matches_reference(result.out, result.lse, inputs)
    assert "_float8" in next(iter(result.grids))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dims", KERNEL_DIMS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_every_instance(tile: int, dtype: torch.dtype, dims: tuple[int, int], arch: str) -> None:
    for number, cut in enumerate(CUTS.values()):
        for scope in ("group", "token"):
            sizes = {"h": tile - number, "Dk": dims[0], "Dv": dims[1]}
            inputs = replace(case("fp8-pages-group"), dtype=dtype, kv_scope=scope, **sizes).inputs()
            result = selection_attention(**inputs.arguments(return_lse=True), arch=arch, **cut)
            assert_matches_reference(result.out, result.lse, inputs)

"""The machine code's results against the fp64 reference and its counts against the emulator's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_sel.testing import Inputs, assert_matches_reference, make_inputs
from tests import host_run
from tests.backends_under_test import kernel_cannot
from tests.cases import CASES, HALF, KERNEL_DIMS, Case, case
from tests.machine_code import Run, code, selection_attention
from tests.machine_code.call import DEVICES

ARCHS = ("sm_80", "sm_90")
SAMPLE = (
    *("h5", "empty-rows", "hostile-int64", "seq-lens-zero", "many-tiny-spans", "pages-16", "pages-packed"),
    *("blocks-unused", "blocks-64-bit-product", "draft-causal", "h16-192x128", "nsa-paper-short"),
)
# How a call may be cut: whole rows, clusters or partials, the planner's own choice, the cut that no batch changes.
CUTS: dict[str, dict[str, Any]] = {
    "whole": {"num_splits": 1},
    "three": {"num_splits": 3},
    "planned": {},
    "invariant": {"batch_invariant": True},
}
INSTANCES = [(dtype, dims, tile) for dtype in HALF for dims in KERNEL_DIMS for tile in (16, 32, 64)]


def run(inputs: Inputs, arch: str, **keywords: Any) -> Run:
    """Run a call and compare it with the reference; a row that selects something has to have used the tensor cores."""
    result = selection_attention(**inputs.arguments(return_lse=True), arch=arch, **keywords)
    assert_matches_reference(result.out, result.lse, inputs)
    some = any(inputs.tokens(row) for row in inputs.rows())
    assert (result.counts["HMMA"] > 0) == some
    assert (result.clocks > 0) == bool(result.out.numel())
    return result


def ragged(dtype: torch.dtype, dims: tuple[int, int], h: int, index: torch.dtype, page_size: int | None) -> Inputs:
    """Make rows of 0 to about 400 tokens in odd spans, NaN in all that is not selected."""
    generator = torch.Generator().manual_seed(h)
    start = torch.randint(-9, 500, (2, 1, 2, 5), generator=generator)
    spans = torch.stack([start, start + torch.randint(-5, 120, start.shape, generator=generator)], -1)
    spans[0, 0, 0] = 0
    return make_inputs(
        ranges=spans.to(index), h=h, Dk=dims[0], Dv=dims[1], S_kv=512, dtype=dtype, seq_lens=[512, 389],
        page_size=page_size,
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SAMPLE)
def test_cases_of_the_common_suite(name: str, arch: str) -> None:
    run(case(name).inputs(), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("chosen", [c for c in CASES if kernel_cannot(c) is None], ids=lambda c: c.name)
def test_every_case_of_the_common_suite(chosen: Case, arch: str) -> None:
    run(chosen.inputs(), arch)
    if not chosen.heavy:
        run(chosen.inputs(), arch, num_splits=1)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("cut", CUTS)
def test_cuts(cut: str, arch: str) -> None:
    inputs = ragged(torch.bfloat16, (192, 128), 13, torch.int32, None)
    result = run(inputs, arch, **CUTS[cut])
    clusters = arch == "sm_90" and cut in ("three", "planned")
    assert (result.plan["cluster"] > 1) == clusters
    assert (result.combine is not None) == (cut != "whole" and not clusters)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "dims", "tile"), INSTANCES)
def test_every_instance(dtype: torch.dtype, dims: tuple[int, int], tile: int, arch: str) -> None:
    for number, cut in enumerate(CUTS.values()):
        index = (torch.int32, torch.int64)[number % 2]
        for h, page_size in ((tile, None), (tile // 2 + 1, 16), (1 if tile == 16 else tile - 3, 64)):
            run(ragged(dtype, dims, h, index, page_size), arch, **cut)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dims", [(128, 128), (192, 128)])
def test_every_instance_with_bulk_copies(dims: tuple[int, int], dtype: torch.dtype) -> None:
    for cut in CUTS.values():
        for h, page_size in ((16, None), (5, 16)):
            run(ragged(dtype, dims, h, torch.int32, page_size), "sm_90", loads="bulk", **cut)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("cut", ["whole", "three"])
@pytest.mark.parametrize(("n", "size", "index"), [(513, 4, torch.int32), (2051, 1, torch.int64)])
@pytest.mark.parametrize("blocks", [False, True])
def test_many_short_spans(blocks: bool, n: int, size: int, index: torch.dtype, cut: str, arch: str) -> None:
    ids = torch.arange(0, 2 * n, 2).to(index).view(1, 1, 1, n)
    ids[..., 5:60] = -1  # slots that select nothing, a whole chunk of them too
    selection: dict[str, Any] = {"block_indices": ids, "block_size": size}
    if not blocks:
        selection = {"ranges": torch.stack([ids * size, ids * size + size], -1).clamp(min=0)}
    run(make_inputs(**selection, h=3, Dk=64, Dv=64, S_kv=2 * n * size, dtype=torch.bfloat16), arch, **CUTS[cut])


# What the emulator counts once a warp, and the opcodes of it. Barriers of a block are counted by meetings.
SAME = {
    "MMA": ("HMMA",),
    "LDGSTS": ("LDGSTS",),
    "LDSM": ("LDSM",),
    "MOVM": ("MOVM",),
    "CP_ASYNC_ARRIVE": ("ARRIVES",),
    "MBAR_ARRIVE": ("SYNCS.ARRIVE", "ATOMS"),
    "CLUSTER": ("UCGABAR_ARV", "UCGABAR_WAIT"),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("cut", ["whole", "three"])
def test_counts_equal_the_emulators(cut: str, arch: str) -> None:
    inputs = ragged(torch.bfloat16, (192, 128), 13, torch.int32, None)
    result = run(inputs, arch, **CUTS[cut])
    emulated = host_run.selection_attention(
        **inputs.arguments(return_lse=True), options=host_run.Options(device=DEVICES[arch]), **CUTS[cut]
    ).counters["ops"]
    same = dict(SAME) | ({"MBAR_WAIT": ("SYNCS.PHASECHK",)} if arch == "sm_90" else {})  # sm_80 polls by plain loads
    for name, opcodes in same.items():
        assert sum(result.counts[o] for o in opcodes) == emulated[name].requests, name
    # On sm_90 addresses that are kept in registers are generic, and so are those of the three splits' shared memory, of
    # which a block's own counts as LDS in the emulator.
    loads = emulated["LDG"].requests + emulated["LDS_REMOTE"].requests * 3 // 2
    assert result.counts["LDG"] + result.counts["LD"] == loads
    assert sum(grid.barriers for grid in result.grids.values()) == emulated["BAR"].requests
    assert sum(grid.copied for grid in result.grids.values()) == emulated["LDGSTS"].lanes


@pytest.mark.parametrize("arch", ARCHS)
def test_two_runs_give_the_same_bits_and_a_batch_changes_none_of_an_invariant_row(arch: str) -> None:
    inputs = ragged(torch.bfloat16, (64, 64), 4, torch.int32, None)
    first, second = (run(inputs, arch, batch_invariant=True) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert first.clocks == second.clocks
    arguments = inputs.arguments(return_lse=True)
    one = {n: t[1:] if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    assert torch.equal(selection_attention(**one, arch=arch, batch_invariant=True).out, first.out[1:])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_instruction_of_any_kernel_is_unknown(arch: str) -> None:
    kernels = code.shipped(arch)
    if kernels is None:
        pytest.skip("this build has no kernels")
    for kernel in kernels:
        assert code.program(kernel, arch).unknown() == [], kernel

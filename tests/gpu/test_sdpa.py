"""Packed SDPA on a GPU: a captured graph sees new values on replay, and an eager call waits once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nsa_sel
from nsa_sel.testing import assert_matches_reference
from tests.cases import case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="sdpa-on-gpu: no CUDA device on this machine"),
]


def test_replays_of_a_real_graph_see_new_values() -> None:
    inputs = case("pages-16").inputs().to("cuda")
    arguments = inputs.arguments(return_lse=True, backend="sdpa", max_selected=256)
    nsa_sel.selection_attention(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = nsa_sel.selection_attention(**arguments)
    for seed in (1, 2):
        other = replace(case("pages-16"), seed=seed).inputs().to("cuda")
        for name in ("q", "k", "v", "ranges", "seq_lens", "block_table"):
            getattr(inputs, name).copy_(getattr(other, name))
        graph.replay()
        assert_matches_reference(out, lse, inputs)


def test_one_synchronisation_on_a_gpu() -> None:
    inputs = case("pages-16").inputs().to("cuda")
    nsa_sel.selection_attention(**inputs.arguments(backend="sdpa"))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as seen:
            nsa_sel.selection_attention(**inputs.arguments(backend="sdpa"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 1

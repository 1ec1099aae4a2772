"""Adapter: FlashAttention over gathered K and V, its gather inside the timing.

A peer to measure and nothing more: it selects nothing, so every call gathers the rows' tokens first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_sel.measure.run.contestants import gather_index
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import needs

MODULE = "flash_attn"


def refuses(inputs: Inputs) -> str | None:
    """Return why it cannot take these inputs."""
    return needs(inputs, blocks=False, paged=None, equal_dims=True, unused=True)


def prepare(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Return gather and attention; all selected tokens are visible, so nothing is causal."""
    from flash_attn import flash_attn_func

    w = inputs.workload
    q = inputs.q.view(w.rows, 1, w.h, w.Dk)
    # Which tokens are selected is worked out once: in its favour, and a read-back that a graph would not take.
    index = gather_index(inputs)

    def call() -> torch.Tensor:
        k, v = inputs.k[index], inputs.v[index]
        out: torch.Tensor = flash_attn_func(q, k[:, :, None], v[:, :, None], causal=False)
        return out.view(w.B, w.S, w.G, w.h, w.Dv)

    return call

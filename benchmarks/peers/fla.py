"""Adapter: flash-linear-attention's selection forward, every (b, g) a sequence of one query.

`parallel_nsa_fwd`, not `parallel_nsa`, which pools all of K and V in every call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import block_pointers, needs

MODULE = "fla.ops.nsa.parallel"
available = block_pointers


def refuses(inputs: Inputs) -> str | None:
    """Return why it cannot take these inputs."""
    h = inputs.workload.h
    reason = needs(inputs, equal_dims=False, unused=True)
    return reason or (f"takes h = 16, 32, 64 ..., got {h}" if h < 16 or h & (h - 1) else None)


def prepare(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Return the forward over these blocks, unused slots counted out."""
    from fla.ops.nsa.parallel import parallel_nsa_fwd

    w = inputs.workload
    assert inputs.block_indices is not None
    sequences = w.B * w.G
    ids = inputs.block_indices.view(sequences, 1, 1, w.n).long()
    counts = (ids >= 0).sum(dim=-1)
    q = inputs.q.view(sequences, 1, w.h, w.Dk)
    k, v = inputs.k.view(sequences, w.S_kv, 1, w.Dk), inputs.v.view(sequences, w.S_kv, 1, w.Dv)

    def call() -> torch.Tensor:
        found = parallel_nsa_fwd(
            q=q, k=k, v=v, block_indices=ids, block_counts=counts, block_size=w.block_size, scale=w.Dk**-0.5
        )
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return out.view(w.B, w.S, w.G, w.h, w.Dv)

    return call

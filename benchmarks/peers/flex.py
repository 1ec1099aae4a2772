"""Adapter: PyTorch's flex_attention, compiled, under a block mask of the selected blocks.

Every selected block is a full one, so no mask function runs; uncompiled it would ignore the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import needs

MODULE = "torch"
SHAPES = 1024  # more than a run has


def refuses(inputs: Inputs) -> str | None:
    """Return why it cannot take these inputs."""
    return needs(inputs, equal_dims=False)


def prepare(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Return compiled flex_attention over a block mask that is made here, outside of the timing."""
    w, mask, run = inputs.workload, block_mask(inputs), _compiled()
    q = inputs.q.view(w.B * w.G, w.h, 1, w.Dk)
    k, v = inputs.k.view(w.B * w.G, 1, w.S_kv, w.Dk), inputs.v.view(w.B * w.G, 1, w.S_kv, w.Dv)
    return lambda: run(q, k, v, block_mask=mask, enable_gqa=True).view(w.B, w.S, w.G, w.h, w.Dv)


def block_mask(inputs: Inputs):  # type: ignore[no-untyped-def]  # the class is imported in here
    """Return the mask of one query block over the selected blocks of every (b, g), all of them full."""
    from torch.nn.attention.flex_attention import BlockMask

    w = inputs.workload
    assert inputs.block_indices is not None
    assert w.block_size is not None
    sequences, total = w.B * w.G, w.S_kv // w.block_size
    ids = torch.zeros(sequences, 1, 1, total, dtype=torch.int32, device=inputs.q.device)
    ids[..., : w.n] = inputs.block_indices.view(sequences, 1, 1, w.n)
    none = torch.zeros(sequences, 1, 1, dtype=torch.int32, device=inputs.q.device)
    return BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(ids),
        full_kv_num_blocks=none + w.n,
        full_kv_indices=ids,
        BLOCK_SIZE=(128, w.block_size),
        seq_lengths=(1, w.S_kv),
        compute_q_blocks=False,
    )


@cache
def _compiled(backend: str = "inductor") -> Callable[..., torch.Tensor]:
    from torch._dynamo import config
    from torch.nn.attention import flex_attention

    # By default dynamo gives up after eight shapes and then runs the function as it stands: dense, in flex's name.
    config.recompile_limit = config.accumulated_recompile_limit = SHAPES
    config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention.flex_attention, fullgraph=True, dynamic=False, backend=backend)

"""Adapter: vLLM's MiniMax-M3 sparse decode, over the same packed paged cache.

Pages and blocks are 128 tokens and the cache is one pool with K and V side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import needs

MODULE = "vllm.models.minimax_m3.common.ops.sparse_attn"


def refuses(inputs: Inputs) -> str | None:
    """Return why it cannot take these inputs."""
    sizes = inputs.workload.block_size, inputs.workload.page_size
    other = f"takes blocks and pages of 128 tokens, got {sizes[0]} and {sizes[1]}"
    return needs(inputs, paged=True) or (other if sizes != (128, 128) else None)


def prepare(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Return the decode over these blocks, which are logical pages; the output is allocated once, as vLLM does."""
    from vllm.models.minimax_m3.common.ops.sparse_attn import minimax_m3_sparse_attn_decode as decode

    w = inputs.workload
    assert inputs.block_indices is not None
    q = inputs.q.view(w.B, w.G * w.h, w.Dk)
    # K and V are slices of one pool [P, G, 128, Dk + Dv], which is what it takes.
    pool = inputs.k.as_strided((*inputs.k.shape[:3], w.Dk + w.Dv), inputs.k.stride())
    ids = inputs.block_indices.view(w.B, w.G, w.n).transpose(0, 1).contiguous()  # [G, T, n]
    lengths = torch.full((w.B,), w.S_kv, dtype=torch.int32, device=q.device)
    output = torch.empty(w.B, w.G * w.h, w.Dv, dtype=q.dtype, device=q.device)
    how = {"num_kv_heads": w.G, "sm_scale": w.Dk**-0.5, "output": output, "decode_query_len": 1}

    def call() -> torch.Tensor:
        decode(q, pool, ids, inputs.block_table, lengths, **how)
        return output.view(w.B, w.S, w.G, w.h, w.Dv)

    return call

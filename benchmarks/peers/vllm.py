"""Adapter: vLLM's MiniMax-M3 sparse decode, over the same packed paged cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import missing, needs, unused_slots


class Vllm:
    """Pages and blocks are 128 tokens and the cache is one pool with K and V side by side."""

    name = "vllm"

    MODULE = "vllm.models.minimax_m3.common.ops.sparse_attn"

    def available(self) -> str | None:
        """Return why vLLM is not here."""
        return missing(self.MODULE)

    def refuses(self, inputs: Inputs) -> str | None:
        """Return why it cannot take these inputs."""
        w = inputs.workload
        reason = needs(inputs, paged=True) or unused_slots(inputs)
        if reason is None and (w.block_size, w.page_size) != (128, 128):
            reason = f"takes blocks and pages of 128 tokens, got {w.block_size} and {w.page_size}"
        return reason

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """Return the decode over these blocks, which are logical pages; the output is allocated once, as vLLM does."""
        from vllm.models.minimax_m3.common.ops.sparse_attn import minimax_m3_sparse_attn_decode

        w = inputs.workload
        assert inputs.block_indices is not None
        q = inputs.q.view(w.B, w.G * w.h, w.Dk)
        # K and V are slices of one pool [P, G, 128, Dk + Dv], which is what it takes.
        pool = inputs.k.as_strided((*inputs.k.shape[:3], w.Dk + w.Dv), inputs.k.stride())
        ids = inputs.block_indices.view(w.B, w.G, w.n).transpose(0, 1).contiguous()  # [G, T, n]
        lengths = torch.full((w.B,), w.S_kv, dtype=torch.int32, device=q.device)
        output = torch.empty(w.B, w.G * w.h, w.Dv, dtype=q.dtype, device=q.device)

        def call() -> torch.Tensor:
            minimax_m3_sparse_attn_decode(
                q,
                pool,
                ids,
                inputs.block_table,
                lengths,
                num_kv_heads=w.G,
                sm_scale=w.Dk**-0.5,
                output=output,
                decode_query_len=1,
            )
            return output.view(w.B, w.S, w.G, w.h, w.Dv)

        return call


def adapter() -> Vllm:
    """Return the adapter."""
    return Vllm()

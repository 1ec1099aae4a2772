"""Adapter: native-sparse-attention-triton's decode kernel (XunhaoLai).

Unused slots are -1 at the tail, where the inputs have theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import block_pointers, needs

MODULE = "native_sparse_attention.ops.triton.topk_sparse_attention_decode"
available = block_pointers


def refuses(inputs: Inputs) -> str | None:
    """Return why it cannot take these inputs."""
    return needs(inputs, unused=True)


def prepare(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Return the decode over these blocks; the cache's groups and tokens are swapped as a view."""
    from native_sparse_attention.ops.triton.topk_sparse_attention_decode import topk_sparse_attention_decode as decode

    w = inputs.workload
    assert inputs.block_indices is not None
    q = inputs.q.view(w.B, w.G * w.h, w.Dk)
    k, v = inputs.k.transpose(1, 2), inputs.v.transpose(1, 2)
    ids = inputs.block_indices.view(w.B, w.G, w.n).transpose(0, 1).contiguous()  # [G, B, n]
    lengths = torch.full((w.B,), w.S_kv, dtype=torch.int32, device=q.device)
    return lambda: decode(q, k, v, ids, w.block_size, lengths).view(w.B, w.S, w.G, w.h, w.Dv)

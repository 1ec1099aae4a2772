"""Adapter: FlashInfer's paged decode, every (b, g) a request of its own whose pages are the selected blocks.

The host's plan is made before the timing, so eager and graph times are of `run` alone: a bound in its favour.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.peers import needs

MODULE = "flashinfer"
WORKSPACE = 128 << 20  # bytes, as its documentation advises
refuses = needs


def prepare(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Plan for these blocks and return the run."""
    import flashinfer

    w = inputs.workload
    assert inputs.block_indices is not None
    assert w.block_size is not None
    requests, pages = w.B * w.G, w.S_kv // w.block_size
    device = inputs.q.device
    # Zeroed, as its documentation asks: it finds its counters in it.
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True, backend="auto")
    first = torch.arange(requests, dtype=torch.int32, device=device)[:, None] * pages
    wrapper.plan(
        indptr=torch.arange(requests + 1, dtype=torch.int32, device=device) * w.n,
        indices=(inputs.block_indices.view(requests, w.n) + first).flatten(),
        last_page_len=torch.full((requests,), w.block_size, dtype=torch.int32, device=device),
        num_qo_heads=w.h,
        num_kv_heads=1,
        head_dim=w.Dk,
        page_size=w.block_size,
        q_data_type=inputs.q.dtype,
        kv_data_type=inputs.k.dtype,
    )
    q = inputs.q.view(requests, w.h, w.Dk)
    cache = tuple(t.view(requests * pages, 1, w.block_size, w.Dk) for t in (inputs.k, inputs.v))
    return lambda: wrapper.run(q, cache).view(w.B, w.S, w.G, w.h, w.Dv)

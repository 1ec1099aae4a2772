"""vLLM's block-sparse attention functions, with vLLM's arguments, on `selection_attention`.

`minimax_m3_sparse_attn_decode` and `minimax_m3_sparse_attn` serve MiniMax-M3, `qsa_sparse_paged_attention` Qwen's QSA.
They write into the caller's output, read K and V where vLLM keeps them, look at no value on the host, and may be
captured in a CUDA graph. `register` is the plug-in that puts them into a running vLLM.
"""

from __future__ import annotations

import torch

from nsa_sel.api import selection_attention
from nsa_sel.integrations._vllm_calls import prepare_m3_decode, prepare_m3_prefill, prepare_qsa


@torch.no_grad()
def minimax_m3_sparse_attn_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    topk_idx: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_kv_heads: int,
    sm_scale: float,
    output: torch.Tensor,
    decode_query_len: int,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Decode MiniMax-M3: each request has `decode_query_len` queries, the last tokens of its sequence.

    Only the first `ceil(kv_len / 128)` slots of a row are read, as by vLLM; negative and future blocks select nothing.
    Rows of padding (`seq_lens` 0) come out as 0.

    >>> import torch
    >>> q, output = torch.randn(2, 8, 32), torch.empty(2, 8, 32)
    >>> cache = torch.randn(4, 2, 128, 64)  # four pages, K and V side by side
    >>> blocks = torch.tensor([[[1, 0], [0, -1]], [[0, 1], [0, -1]]], dtype=torch.int32)
    >>> table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    >>> lengths = torch.tensor([200, 90], dtype=torch.int32)
    >>> minimax_m3_sparse_attn_decode(q, cache, blocks, table, lengths, 2, 32**-0.5, output, 1)
    >>> logits = q[1, 0] @ cache[3, 0, :90, :32].T * 32**-0.5  # the second request sees page 3, its first head group 0
    >>> torch.allclose(output[1, 0], logits.softmax(-1) @ cache[3, 0, :90, 32:], atol=1e-5)
    True

    Args:
        q: [R * decode_query_len, G * h, D], request by request.
        kv_cache: pages [P, G, 128, 2 * D], K first, in q's dtype; float8 caches are not supported yet.
        topk_idx: selected blocks [G, R * decode_query_len, n], int32.
        block_table: [R, max_pages] int32.
        seq_lens: tokens in each request's cache [R], int32.
        num_kv_heads: G.
        sm_scale: factor of the logits.
        output: [R * decode_query_len, G * h, D], written to.
        decode_query_len: queries per request.
        k_scale: not used, as by vLLM where the cache is not float8.
        v_scale: as k_scale.

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes do not fit.
    """
    call = prepare_m3_decode(
        q, kv_cache, topk_idx, block_table, seq_lens, num_kv_heads, sm_scale, output, decode_query_len, k_scale, v_scale
    )
    selection_attention(**call.arguments)


@torch.no_grad()
def minimax_m3_sparse_attn(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    topk_idx: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_query_len: int,
    num_kv_heads: int,
    sm_scale: float,
    output: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Prefill MiniMax-M3: requests with different numbers of queries, one after another.

    Args:
        q: [T, G * h, D].
        kv_cache: as in `minimax_m3_sparse_attn_decode`.
        topk_idx: selected blocks [G, T, n], int32.
        block_table: [R, max_pages] int32.
        cu_seqlens_q: where each request's queries begin, and the end of the last [R + 1], int32.
        seq_lens: tokens in each request's cache [R], int32.
        prefix_lens: tokens before each request's first query [R], int32.
        max_query_len: not used; the queries are independent here.
        num_kv_heads: G.
        sm_scale: factor of the logits.
        output: [T, G * h, D], written to; 0 for queries that belong to no request.
        k_scale: as in `minimax_m3_sparse_attn_decode`.
        v_scale: as k_scale.

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes do not fit.
    """
    call = prepare_m3_prefill(
        q, kv_cache, topk_idx, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_query_len, num_kv_heads, sm_scale,
        output, k_scale, v_scale,
    )  # fmt: skip
    selection_attention(**call.arguments)


@torch.no_grad()
def qsa_sparse_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    logical_indices: torch.Tensor,
    block_table: torch.Tensor,
    token_to_req: torch.Tensor,
    use_prefill_config: bool,
    out: torch.Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    *,
    output_gate: torch.Tensor,
) -> torch.Tensor:
    """Attend as Qwen's QSA does: each query has its own token ids, one selection for all heads, and an output gate.

    The gate is one extra step behind the attention: the attention is rounded to q's dtype and multiplied by
    `sigmoid(output_gate)` in fp32. It costs two small launches and a buffer of twice the output.

    Args:
        q: [T, G * h, D].
        k_cache: pages [P, page_size, G, D], in q's dtype; float8 caches are not supported yet.
        v_cache: as k_cache.
        logical_indices: token ids [T, n + 1], int32; the last column counts the ids in use, those behind it may be
            anything. Negative ids, ids behind the block table and ids on pages outside the pool select nothing.
        block_table: [R, max_pages] int32.
        token_to_req: row of block_table for each query [T], int32; out of [0, R): the query selects nothing.
        use_prefill_config: not used; it steers the tiles of vLLM's kernel.
        out: [T, G * h, D], written to; None: a new tensor.
        k_scale: not used, as by vLLM where the cache is not float8.
        v_scale: as k_scale.
        output_gate: [T, G * h * D] or [T, G * h, D], before the sigmoid.

    Returns:
        out [T, G * h, D].

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes do not fit.
    """
    call = prepare_qsa(
        q, k_cache, v_cache, logical_indices, block_table, token_to_req, use_prefill_config, out, k_scale, v_scale,
        output_gate=output_gate,
    )  # fmt: skip
    selection_attention(**call.arguments)
    gated = call.finish()
    assert gated is not None
    return gated


def register() -> None:
    """Put these functions where vLLM calls its Triton kernels: vLLM's plug-in, off unless NSA_SEL_VLLM=1."""
    from nsa_sel.integrations import _vllm_plugin

    _vllm_plugin.register()

"""vLLM's calls in the words of `selection_attention`: views of vLLM's tensors, and no look at a value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nsa_sel.errors import ArgumentError, ArgumentTypeError

M3_BLOCK = 128  # tokens: one selected block is one page of the cache


class Prepared(NamedTuple):
    """One call in the words of `selection_attention`, and what is left to do with its output."""

    arguments: dict[str, Any]
    finish: Callable[[], torch.Tensor | None]


def prepare_m3_decode(
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
) -> Prepared:
    """Say `minimax_m3_sparse_attn_decode` in the words of `selection_attention`."""
    requests, S, G = seq_lens.shape[0], decode_query_len, num_kv_heads
    _require_m3(q, kv_cache, topk_idx, output, G)
    if q.shape[0] != requests * S:
        raise ArgumentError(f"q: expected {requests} requests * {S} queries in front, got {list(q.shape)}")
    visible = seq_lens if S == 1 else seq_lens[:, None] + torch.arange(1 - S, 1, dtype=torch.int32, device=q.device)
    blocks = topk_idx.transpose(0, 1)  # [T, G, n]
    return Prepared(
        dict(
            q=q.view(requests, S, G, -1, q.shape[2]),
            block_indices=blocks.unflatten(0, (requests, S)),
            counts=_blocks_in_sight(visible, topk_idx.shape[2]).view(requests, S, 1).expand(-1, -1, G),
            seq_lens=seq_lens,
            block_table=block_table,
            out=output.view(requests, S, G, -1, q.shape[2]),
            **_m3_cache(kv_cache, sm_scale),
        ),
        lambda: None,
    )


def prepare_m3_prefill(
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
) -> Prepared:
    """Say `minimax_m3_sparse_attn` in the words of `selection_attention`: each query is a request of one query."""
    T, G, last = q.shape[0], num_kv_heads, seq_lens.shape[0] - 1
    _require_m3(q, kv_cache, topk_idx, output, G)
    if cu_seqlens_q.shape[0] != last + 2:
        raise ArgumentError(
            f"cu_seqlens_q: expected [{last + 2}] for {last + 1} requests, got {list(cu_seqlens_q.shape)}"
        )
    token = torch.arange(T, dtype=torch.int32, device=q.device)
    request = torch.bucketize(token, cu_seqlens_q[1:], right=True, out_int32=True)  # last + 1 behind the last query
    own = request.clamp(max=last)
    position = (prefix_lens - cu_seqlens_q[:-1]).index_select(0, own) + token
    visible = position + 1
    return Prepared(
        dict(
            q=q.view(T, 1, G, -1, q.shape[2]),
            block_indices=topk_idx.transpose(0, 1).unsqueeze(1),
            counts=_blocks_in_sight(visible, topk_idx.shape[2]).view(T, 1, 1).expand(-1, -1, G),
            seq_lens=torch.minimum(visible, seq_lens.index_select(0, own)),
            block_table=block_table,
            table_rows=request,
            out=output.view(T, 1, G, -1, q.shape[2]),
            **_m3_cache(kv_cache, sm_scale),
        ),
        lambda: None,
    )


def prepare_qsa(
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
) -> Prepared:
    """Say `qsa_sparse_paged_attention` in the words of `selection_attention`, and the gate as what is left to do."""
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise ArgumentError(
            f"q, k_cache: expected [T, G * h, D], [P, page_size, G, D], got {list(q.shape)}, {list(k_cache.shape)}"
        )
    _require_no_float8("k_cache", k_cache)
    T, heads, D = q.shape
    G, n = k_cache.shape[2], logical_indices.shape[-1] - 1
    if logical_indices.shape != (T, n + 1) or n < 1:
        raise ArgumentError(f"logical_indices: expected [T={T}, n + 1 >= 2], got {list(logical_indices.shape)}")
    if output_gate.numel() != q.numel():
        raise ArgumentError(f"output_gate: expected the elements of q {list(q.shape)}, got {list(output_gate.shape)}")
    if out is None:
        out = torch.empty_like(q)
    elif out.shape != q.shape or out.dtype != q.dtype:
        raise ArgumentError(f"out: expected {q.dtype} {list(q.shape)} (q's), got {out.dtype} {list(out.shape)}")
    # glu multiplies its first half by the sigmoid of its second, in fp32 whatever the dtype
    halves = q.new_empty(T, heads, 2 * D)

    def gate() -> torch.Tensor:
        halves[..., D:] = output_gate.view_as(q)
        return torch.ops.aten.glu.out(halves, -1, out=out)

    arguments = dict(
        q=q.view(T, 1, G, -1, D),
        k=k_cache.transpose(1, 2),
        v=v_cache.transpose(1, 2),
        block_indices=logical_indices[:, None, None, :-1].expand(-1, -1, G, -1),
        block_size=1,
        counts=logical_indices[:, None, -1:].expand(-1, -1, G),
        block_table=block_table,
        table_rows=token_to_req,
        causal=False,
        out=halves[..., :D].view(T, 1, G, -1, D),
    )
    return Prepared(arguments, gate)


def _m3_cache(kv_cache: torch.Tensor, sm_scale: float) -> dict[str, Any]:
    """Return the packed cache as arguments; nothing is copied."""
    D = kv_cache.shape[3] // 2
    return dict(k=kv_cache[..., :D], v=kv_cache[..., D:], block_size=M3_BLOCK, softmax_scale=sm_scale)


def _require_m3(q: torch.Tensor, kv_cache: torch.Tensor, topk_idx: torch.Tensor, output: torch.Tensor, G: int) -> None:
    if q.dim() != 3 or G < 1 or q.shape[1] % G:
        raise ArgumentError(f"q: expected [T, heads, D] with heads a multiple of {G} KV heads, got {list(q.shape)}")
    if kv_cache.dim() != 4 or kv_cache.shape[1:] != (G, M3_BLOCK, 2 * q.shape[2]):
        raise ArgumentError(
            f"kv_cache: expected [P, G={G}, {M3_BLOCK}, 2 * D={2 * q.shape[2]}], got {list(kv_cache.shape)}"
        )
    _require_no_float8("kv_cache", kv_cache)
    if topk_idx.dim() != 3 or topk_idx.shape[:2] != (G, q.shape[0]):
        raise ArgumentError(f"topk_idx: expected [G={G}, T={q.shape[0]}, n], got {list(topk_idx.shape)}")
    if output.shape != q.shape:
        raise ArgumentError(f"output: expected q's shape {list(q.shape)}, got {list(output.shape)}")


def _require_no_float8(name: str, cache: torch.Tensor) -> None:
    if cache.element_size() == 1:  # vLLM hands scales over with other caches too, and ignores them
        raise ArgumentTypeError(f"{name}: expected q's dtype, got {cache.dtype}; float8 caches are not supported yet")


def _blocks_in_sight(visible: torch.Tensor, n: int) -> torch.Tensor:
    """Return min(n, ceil(visible / 128)) as int32: how many slots vLLM reads of a row that sees so many tokens.

    It is how many of 0, 128, ... lie below: one launch, where add, divide and clamp are three on every layer.
    """
    capturing = visible.is_cuda and torch.cuda.is_current_stream_capturing()
    # a tensor made during a capture lives in the graph's pool, where nothing may be kept for later calls
    begins = (_block_begins.__wrapped__ if capturing else _block_begins)(n, visible.device)
    return torch.bucketize(visible, begins, out_int32=True)


@functools.lru_cache(maxsize=64)
def _block_begins(n: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, n * M3_BLOCK, M3_BLOCK, dtype=torch.int32, device=device)

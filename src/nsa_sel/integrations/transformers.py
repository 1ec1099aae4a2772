"""MiniMax-M3 in Hugging Face transformers: `register()`, then `attn_implementation="nsa_sel"`.

The model's indexer hands its attention function the blocks that each query selected. Eager and sdpa expand them to a
mask over the whole cache; here they go to `selection_attention` as they are, and only selected tokens are read.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from nsa_sel.api import selection_attention
from nsa_sel.errors import ArgumentError, BackendError

NAME = "nsa_sel"
# Model types that select nothing themselves but sit beside a decoder that does.
_TOWERS = ("minimax_m3_vl_vision",)
_DENSE_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
_NOT_PASSED = object()


def register() -> None:
    """Make `attn_implementation="nsa_sel"` known to transformers; calling it again changes nothing.

    Padding and causality come as the mask that transformers makes for its "sdpa", which is none where there is no
    padding.

    Raises:
        ImportError: transformers is not installed, or is a version without these interfaces.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    block_indices: Any = _NOT_PASSED,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks an attention function to: out [B, S, G * h, Dv] and no weights.

    Args:
        module: the attention layer; `module.indexer.block_size` says how many tokens a block holds.
        query: [B, G * h, S, Dk].
        key: [B, G, S_kv, Dk].
        value: [B, G, S_kv, Dv].
        attention_mask: what each query may see, [B, 1, S, S_kv] bool or additive; None: causal. The tokens that a
            query may see must be one stretch of the cache.
        dropout: must be 0 where blocks are selected.
        scaling: default `Dk ** -0.5`.
        block_indices: selected blocks [B, G, S, n]; negative: unused slot. None: this layer attends to everything,
            by the sdpa of transformers.
        kwargs: what else a model passes on.

    Raises:
        ArgumentError: the mask has holes, or dropout is asked for.
        BackendError: the model never selects.
    """
    if block_indices is None or block_indices is _NOT_PASSED:
        _require_selecting_model(module, block_indices is None)
        return _dense(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ArgumentError(f"dropout: expected 0 with selected blocks, got {dropout}; set attention_dropout=0")
    if kwargs.get("cache") is not None:
        raise ArgumentError("cache: expected None, got a paged cache; continuous batching is not supported")

    S, (G, S_kv) = query.shape[2], key.shape[1:3]
    q = query.transpose(1, 2).unflatten(2, (G, -1))  # [B, S, G, h, Dk]
    blocks = block_indices.transpose(1, 2)  # [B, S, G, n]
    block_size = module.indexer.block_size
    if attention_mask is None:
        if 1 < S < S_kv:  # the first tokens of a cache that is larger than what it holds
            key, value = key[:, :, :S], value[:, :, :S]
        out = selection_attention(q, key, value, block_indices=blocks, block_size=block_size, softmax_scale=scaling)
    else:
        ranges, sees_nothing, holes = _visible_ranges(blocks, block_size, attention_mask, S_kv)
        # Eager adds the same huge number to every logit of a query that may see none of its tokens (padding, mostly)
        # and so averages the whole cache. The indexers of later layers read what comes of it, so it must be the same.
        q = q.masked_fill(sees_nothing[..., None, None], 0)
        if holes is not None:  # nobody could look: such a query comes out as NaN, never as a plausible wrong answer
            q = q.masked_fill(holes[..., None, None, None], math.nan)
        out = selection_attention(
            q, key, value, ranges, causal=False, max_selected=blocks.shape[-1] * block_size, softmax_scale=scaling
        )
    return out.flatten(2, 3), None  # type: ignore[union-attr]


def _visible_ranges(
    blocks: torch.Tensor, block_size: int, mask: torch.Tensor, S_kv: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cut the blocks [B, S, G, n] to what the mask lets each query see.

    Returns:
        ranges [B, S, G, n, 2]; which rows [B, S, G] see nothing (their first range is then the whole cache); and where
        the mask must not be looked at (compiled, captured) which queries [B, S] have holes in it.
    """
    visible = mask if mask.dtype == torch.bool else mask == 0
    if visible.shape[1] != 1:
        raise ArgumentError(
            f"attention_mask: expected one mask for all heads [B, 1, S, S_kv], got {list(visible.shape)}"
        )
    visible = visible[:, 0, :, :S_kv]
    count = visible.sum(-1)  # [B, S]
    first = visible.to(torch.uint8).argmax(-1)
    last = S_kv - visible.flip(-1).to(torch.uint8).argmax(-1)
    last = torch.where(count > 0, last, first)
    holes = count != last - first
    must_not_sync = torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    if not must_not_sync and bool(holes.any()):
        raise ArgumentError(
            "attention_mask: expected the tokens that a query may see to be one stretch of the cache, got a mask "
            "with holes; use attn_implementation='sdpa' for it"
        )
    starts = (blocks * block_size).clamp(min=first[:, :, None, None])
    ends = (blocks * block_size + block_size).clamp(max=last[:, :, None, None])
    used = (blocks >= 0) & (starts < ends)
    starts, ends = starts.masked_fill(~used, 0), ends.masked_fill(~used, 0)
    sees_nothing = ~used.any(-1)
    ends[..., 0] = torch.where(sees_nothing, S_kv, ends[..., 0])
    return torch.stack((starts, ends), -1), sees_nothing, holes if must_not_sync else None


def _dense(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to everything by the sdpa of transformers; queries that may see nothing come out as in eager."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.dtype == torch.bool:
        # A query of zeros averages what it sees. An additive mask would do as well, but not in the gradients: the
        # log-sum-exp that sdpa keeps of a row of the smallest numbers has lost the number of its terms.
        sees_nothing = ~mask.any(-1, keepdim=True)  # [B, 1, S, 1]
        query, mask = query.masked_fill(sees_nothing, 0), mask | sees_nothing
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _require_selecting_model(module: Any, passes_blocks: bool) -> None:
    """Refuse a model whose layers never select: it would run sdpa under another name."""
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) in _TOWERS:
        return
    layers = getattr(config, "layer_types", None) or ()
    if passes_blocks and any(kind not in _DENSE_LAYERS for kind in layers):
        return
    raise BackendError(
        f"attn_implementation='{NAME}': expected a model with layers that select blocks (MiniMax-M3 with "
        f"'minimax_m3_sparse' among its layer_types), got {type(module).__name__}, which never selects; use 'sdpa'"
    )

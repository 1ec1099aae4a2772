"""Packed SDPA on any device: a chunk gathered at once, or piece by piece where one row is larger than the budget."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from nsa_sel.backends import _gather
from nsa_sel.backends._gather import Counters, Selection
from nsa_sel.backends._plan import Chunk
from nsa_sel.call import Call


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of this one are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    call: Call, selection: Selection, rows: torch.Tensor, chunk: Chunk, count: Counters
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend the rows [r] of one chunk, piece by piece: out [r, h, Dv] and lse [r, h] or None."""
    split = chunk.piece < chunk.tokens
    out, lse = _attend(call, selection, rows, 0, chunk.piece, chunk.masked, split, count)
    for begin in range(chunk.piece, chunk.tokens, chunk.piece):
        end = min(begin + chunk.piece, chunk.tokens)
        part, part_lse = _attend(call, selection, rows, begin, end, chunk.masked, split, count)
        assert lse is not None
        assert part_lse is not None
        out, lse = _merge(out, lse, part, part_lse)
    return out.to(call.q.dtype), lse


def _attend(
    call: Call,
    selection: Selection,
    rows: torch.Tensor,
    begin: int,
    end: int,
    masked: bool,
    split: bool,
    count: Counters,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend the rows [r] to their positions [begin, end).

    out always comes from SDPA, so that asking for lse does not change it. SDPA keeps softmax statistics and sums of
    half inputs in fp32 and gives no lse, which is computed from fp32 logits beside it. Parts of a split row stay fp32.
    """
    count.chunks += 1
    index = _gather.locate(call, selection, rows, begin, end, masked)
    # PyTorch's fused attention on the CPU wants Dk = Dv; without it everything is copied to fp32, which is 3x slower.
    # Columns of zeros change neither the logits nor the other columns of out.
    width = max(call.Dk, call.Dv) if call.device_type == "cpu" else 0
    keys = _gather.gather(call, "k", index, count, width)
    values = _gather.gather(call, "v", index, count, width)
    queries = call.q.reshape(call.rows, call.h, call.Dk).index_select(0, rows)
    queries = torch.nn.functional.pad(queries, (0, keys.shape[-1] - call.Dk))
    wide = accumulator(queries.dtype)
    if split:
        queries, keys, values = queries.to(wide), keys.to(wide), values.to(wide)

    mask = index.valid
    out = scaled_dot_product_attention(
        queries.unsqueeze(1),
        keys.unsqueeze(1),
        values.unsqueeze(1),
        attn_mask=None if mask is None else mask[:, None, None, :],
        scale=call.scale,
    ).squeeze(1)[..., : call.Dv]
    lse = None
    # PyTorch's fused attention on the CPU gives 0 for half inputs where a logit is infinite, and softmax gives NaN
    doubtful = call.device_type == "cpu" and queries.element_size() == 2
    if call.return_lse or split or doubtful:
        logits = torch.matmul(queries.to(wide), keys.to(wide).transpose(1, 2)) * call.scale
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(1), -math.inf)
        lse = torch.logsumexp(logits, -1)
        if doubtful:
            out = out.masked_fill(~(lse < math.inf).unsqueeze(-1), math.nan)
    if mask is not None:
        # a row without any token here (empty, or its pages are missing): kernels differ on the softmax over nothing
        out = out.masked_fill(~mask.any(1)[:, None, None], 0)
    return out, lse


def _merge(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two parts of the same rows by their log-sum-exp."""
    both = torch.logaddexp(lse, part_lse)
    # where both are -inf there is nothing to weigh: (-inf) - (-inf) is NaN, so subtract 0 and weigh both with 0
    base = both.masked_fill(both == -math.inf, 0)
    weight, part_weight = torch.exp(lse - base).unsqueeze(-1), torch.exp(part_lse - base).unsqueeze(-1)
    return out * weight + part * part_weight, both

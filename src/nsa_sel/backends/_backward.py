"""Gradients of packed SDPA: the same chunks, gathered once more, so that training too keeps to the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nsa_sel.backends import _gather
from nsa_sel.backends._plan import Chunk
from nsa_sel.call import Call


@dataclass(slots=True)
class Gradients:
    """Sums in fp32 (fp64 for fp64 inputs); shapes of q as [R, h, Dk], of k and of v, where those are not float8."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None

    @classmethod
    def zeros(cls, call: Call, wide: torch.dtype) -> Gradients:
        """Return gradients of a call in which no row selects anything."""
        of_q = call.q.new_zeros((call.rows, call.h, call.Dk), dtype=wide)
        if call.fp8:
            return cls(of_q, None, None)
        return cls(
            of_q,
            torch.zeros(call.k.shape, dtype=wide, device=call.k.device),
            torch.zeros(call.v.shape, dtype=wide, device=call.v.device),
        )


def accumulate(
    call: Call,
    selection: _gather.Selection,
    rows: torch.Tensor,
    chunk: Chunk,
    out: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    into: Gradients,
    count: _gather.Counters,
) -> None:
    """Add what the rows [r] of one chunk contribute; out and d_out [R, h, Dv], d_lse [R, h] or None."""
    wide = into.q.dtype
    queries = call.q.reshape(call.rows, call.h, -1).index_select(0, rows).to(wide)
    d_rows = d_out.index_select(0, rows).to(wide)
    # d logits = p * (d p - pull): the softmax's own term, less what comes in through lse, whose gradient is p
    pull = (d_rows * out.index_select(0, rows).to(wide)).sum(-1)
    if d_lse is not None:
        pull = pull - d_lse.index_select(0, rows).to(wide)

    pieces = [(begin, min(begin + chunk.piece, chunk.tokens)) for begin in range(0, chunk.tokens, chunk.piece)]
    lse = None
    if len(pieces) > 1:
        for begin, end in pieces:
            part = torch.logsumexp(_logits(call, selection, rows, begin, end, chunk.masked, queries, count)[0], -1)
            lse = part if lse is None else torch.logaddexp(lse, part)
    d_queries = torch.zeros_like(queries)
    for begin, end in pieces:
        logits, keys, index = _logits(call, selection, rows, begin, end, chunk.masked, queries, count)
        total = torch.logsumexp(logits, -1) if lse is None else lse
        # a row without any token has total = -inf: (-inf) - (-inf) is NaN, so subtract 0 and get p = 0
        p = torch.exp(logits - total.masked_fill(total == -math.inf, 0).unsqueeze(-1))  # [r, h, T]
        values = _gather.gather(call, "v", index, count).to(wide)
        d_logits = p * (torch.matmul(d_rows, values.transpose(1, 2)) - pull.unsqueeze(-1)) * call.scale
        d_queries += torch.matmul(d_logits, keys)
        if into.k is not None and into.v is not None:
            _scatter(into.k, index, torch.matmul(d_logits.transpose(1, 2), queries))
            _scatter(into.v, index, torch.matmul(p.transpose(1, 2), d_rows))
    into.q.index_copy_(0, rows, d_queries)


def _logits(
    call: Call,
    selection: _gather.Selection,
    rows: torch.Tensor,
    begin: int,
    end: int,
    masked: bool,
    q: torch.Tensor,
    count: _gather.Counters,
) -> tuple[torch.Tensor, torch.Tensor, _gather.Index]:
    """Return scaled logits [r, h, T] with -inf in the invalid slots, the keys [r, T, Dk] and where they lie."""
    index = _gather.locate(call, selection, rows, begin, end, masked)
    keys = _gather.gather(call, "k", index, count).to(q.dtype)
    logits = torch.matmul(q, keys.transpose(1, 2)) * call.scale
    if index.valid is not None:
        logits = logits.masked_fill(~index.valid.unsqueeze(1), -math.inf)
    return logits, keys, index


def _scatter(gradient: torch.Tensor, index: _gather.Index, rows: torch.Tensor) -> None:
    """Add the rows [r, T, D] where they were gathered; repeated tokens are summed in a fixed order."""
    if index.valid is not None:
        rows = rows.masked_fill(~index.valid.unsqueeze(-1), 0)  # else NaN in d_out would reach the token they point at
    if gradient.device.type == "cpu":
        G, tokens, D = gradient.shape[1:]
        place = (index.first * G + index.group) * tokens + index.token
        gradient.view(-1, D).index_add_(0, place.reshape(-1), rows.reshape(-1, D))  # 2.7 times as fast as index_put_
        return
    # unlike index_add_, which adds atomically on a GPU, index_put_ gives the same bits in every run
    gradient.index_put_((index.first, index.group, index.token), rows, accumulate=True)

"""The oracle: fp64, one row at a time, in plain Python integers and dense algebra; shares no code with any backend."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def selected_tokens(
    spans: Iterable[tuple[int, int]], kv_len: int, page_ids: list[int] | None = None, page_size: int = 1, pages: int = 0
) -> list[int]:
    """Return the token ids that a row attends to, in the order of its spans; one that is listed twice stands twice.

    >>> selected_tokens([(2, 4), (5, 1), (-3, 1), (6, 99)], kv_len=8)
    [2, 3, 0, 6, 7]

    Args:
        spans: half-open [start, end), any integers.
        kv_len: tokens that the row may see.
        page_ids: physical page of each logical page, where the cache is paged; a token is dropped where that is no
            page in [0, pages).
    """
    tokens = []
    for start, end in spans:
        first = start if start > 0 else 0
        last = end if end < kv_len else kv_len
        for token in range(first, last):
            if page_ids is None or 0 <= page_ids[token // page_size] < pages:
                tokens.append(token)
    return tokens


def row_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    ranges: torch.Tensor | None,
    block_indices: torch.Tensor | None,
    block_size: int | None,
    counts: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    table_rows: torch.Tensor | None,
    causal: bool,
    row: tuple[int, int, int],
) -> list[int]:
    """Return the token ids that row (b, s, g) attends to; arguments as in `selection_attention`."""
    b, s, g = row
    page_size = k.shape[2]
    capacity = k.shape[2] if block_table is None else block_table.shape[1] * page_size
    seq_len = capacity if seq_lens is None else min(max(int(seq_lens[b]), 0), capacity)
    kv_len = max(0, seq_len - q.shape[1] + s + 1) if causal else seq_len
    if ranges is not None:
        spans = [(int(start), int(end)) for start, end in ranges[b, s, g].tolist()]
    else:
        assert block_indices is not None
        assert block_size is not None
        ids = block_indices[b, s, g].tolist()
        # an unused slot stays a slot: counts counts it
        spans = [(block * block_size, (block + 1) * block_size) if block >= 0 else (0, 0) for block in ids]
    if counts is not None:
        spans = spans[: max(0, int(counts[b, s, g]))]
    if block_table is None:
        return selected_tokens(spans, kv_len)
    table_row = b if table_rows is None else int(table_rows[b])
    if not 0 <= table_row < block_table.shape[0]:
        return []
    return selected_tokens(spans, kv_len, block_table[table_row].tolist(), page_size, k.shape[0])


def selection_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    *,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    counts: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
    causal: bool = True,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    softmax_scale: float | None = None,
    rows: Iterable[tuple[int, int, int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `selection_attention` should, in fp64 on the CPU: out [B, S, G, h, Dv] and lse [B, S, G, h].

    >>> q, k = torch.ones(1, 1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
    >>> v = torch.tensor([[[[0.0], [2.0], [4.0], [9.0]]]])
    >>> out, lse = selection_attention_reference(q, k, v, torch.tensor([[[[[0, 3]]]]]))
    >>> out.item(), round(lse.exp().item(), 12)
    (2.0, 3.0)

    Args:
        rows: only these rows (b, s, g); the results are then [len(rows), h, Dv] and [len(rows), h].
    """
    B, S, G, h, Dk = q.shape
    scale = Dk**-0.5 if softmax_scale is None else float(softmax_scale)
    chosen = [(b, s, g) for b in range(B) for s in range(S) for g in range(G)] if rows is None else list(rows)
    out = torch.zeros(len(chosen), h, v.shape[-1], dtype=torch.float64)
    lse = torch.full((len(chosen), h), float("-inf"), dtype=torch.float64)
    for i, (b, s, g) in enumerate(chosen):
        tokens = row_tokens(
            q, k, ranges, block_indices, block_size, counts, seq_lens, block_table, table_rows, causal, (b, s, g)
        )
        if not tokens:
            continue
        page_ids = None if block_table is None else block_table[b if table_rows is None else int(table_rows[b])]
        keys, values = _fetch(k, k_scale, page_ids, b, g, tokens), _fetch(v, v_scale, page_ids, b, g, tokens)
        logits = scale * (q[b, s, g].detach().to("cpu", torch.float64) @ keys.T)  # [h, L]
        lse[i] = torch.logsumexp(logits, dim=1)
        # where every logit is -inf nothing has weight: softmax would divide 0 by 0, and out is 0 as in an empty row
        weights = torch.softmax(logits, dim=1).masked_fill((lse[i] == -math.inf)[:, None], 0)
        out[i] = weights @ values
    if rows is not None:
        return out, lse
    return out.view(B, S, G, h, v.shape[-1]), lse.view(B, S, G, h)


def _fetch(
    cache: torch.Tensor,
    scale: float | torch.Tensor | None,
    page_ids: torch.Tensor | None,
    b: int,
    g: int,
    tokens: list[int],
) -> torch.Tensor:
    """Return the rows [L, D] of one request and group in fp64, those of a float8 cache times their scales."""
    where = torch.tensor(tokens, device=cache.device)
    place: tuple[torch.Tensor | int, ...] = (b, g, where)
    if page_ids is not None:
        page_size = cache.shape[2]
        place = (page_ids.to(torch.int64)[where // page_size], g, where % page_size)
    if cache.dtype == torch.float8_e4m3fn:  # indexing by tensors does not take float8
        rows = cache.detach().view(torch.uint8)[place].view(cache.dtype).to("cpu", torch.float64)
    else:
        rows = cache[place].detach().to("cpu", torch.float64)
    if scale is None:
        return rows
    if not isinstance(scale, torch.Tensor):
        return rows * scale
    if scale.dim() == 3:
        factors = scale[place].to("cpu", torch.float64)
    else:
        factors = scale.reshape(-1)[g if scale.numel() > 1 else 0].to("cpu", torch.float64)
    return rows * factors.reshape(-1, 1)

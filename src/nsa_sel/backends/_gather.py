"""Which tokens each row selects, and their K and V rows gathered: the half of packed SDPA that never computes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from nsa_sel.call import Call


@dataclass(slots=True)
class Counters:
    """What packed SDPA has done, for one call or in all."""

    calls: int = 0
    chunks: int = 0  # pieces of work gathered at once
    gathered_bytes: int = 0  # K and V rows as gathered, padding included
    read_backs: int = 0  # times that device values were looked at


@dataclass(slots=True)
class Selection:
    """The clamped spans of R rows."""

    start: torch.Tensor  # [R, n] int64, first token of span i
    span: torch.Tensor  # [R, n] int64, tokens of span i
    length: torch.Tensor  # [R] int64, L of each row (pages that are not there still counted)
    bad_page: torch.Tensor | None  # [1] int64, above 0: a page inside seq_lens is missing; None: no pages


def resolve(call: Call) -> Selection:
    """Clamp the spans of every row to `[0, kv_len)`, in 64 bits, without looking at a value."""
    S, S_kv, rows = call.S, call.S_kv, call.rows
    device = call.q.device
    seq = None  # [B, 1] tokens of each request; None: S_kv of all
    if call.seq_lens is not None:
        seq = call.seq_lens.to(torch.int64).clamp(0, S_kv).unsqueeze(1)
    elif call.block_table is not None or (call.causal and S > 1):
        seq = torch.full((1, 1), S_kv, dtype=torch.int64, device=device)
    if call.table_rows is not None:
        assert seq is not None
        # an entry without a row of the table has no tokens
        seq = seq.masked_fill(((call.table_rows < 0) | (call.table_rows >= call.num_tables)).unsqueeze(1), 0)
    limit: torch.Tensor | int = S_kv
    if seq is not None:
        kv_len = seq
        if call.causal and S > 1:
            kv_len = (seq + torch.arange(1 - S, 1, device=device)).clamp_min(0)
        limit = kv_len[:, :, None, None]  # [B, S, 1, 1], or 1 for B or S

    if call.ranges is not None:
        start, end = call.ranges.to(torch.int64).unbind(-1)
        # both ends are clamped before they are subtracted: the smallest int64 minus anything would wrap around
        start = start.clamp_min(0).clamp_max(limit)
        span = (end.clamp_min(0).clamp_max(limit) - start).clamp_min(0)
    else:
        assert call.block_indices is not None
        # ids are cut to the first block behind the cache, so that their product with the size cannot leave 64 bits,
        # and to the one before it, which ends where the cache begins
        start = call.block_indices.to(torch.int64).clamp(-1, S_kv // call.block_size + 1) * call.block_size
        end = (start + call.block_size).clamp_max(limit)
        start = start.clamp_min(0).clamp_max(limit)
        span = end - start
    if call.counts is not None:
        span = span.masked_fill(torch.arange(call.n, device=device) >= call.counts.unsqueeze(-1), 0)
    start, span = start.reshape(rows, call.n), span.reshape(rows, call.n)
    return Selection(start, span, span.sum(1), _bad_page(call, seq))


def _bad_page(call: Call, seq: torch.Tensor | None) -> torch.Tensor | None:
    if call.block_table is None:
        return None
    assert seq is not None
    page = torch.arange(call.block_table.shape[1], device=seq.device)
    missing = (call.block_table < 0) | (call.block_table >= call.num_pages)
    # per row of the table, which many entries may share: the first token that has no page
    good = torch.where(missing, page, page.shape[0]).amin(1) if page.shape[0] else page.new_zeros(call.num_tables)
    bad = (good * call.page_size)[_table_row(call)] < seq.squeeze(1) if call.num_tables else seq.squeeze(1) > 0
    return bad.any().to(torch.int64).reshape(1)


def _table_row(call: Call) -> torch.Tensor:
    """Return the row [B] of the page table that each batch entry uses; any row for an entry that has none."""
    if call.table_rows is None:
        return torch.arange(call.B, device=call.q.device)
    return call.table_rows.to(torch.int64).clamp(0, call.num_tables - 1)


@dataclass(slots=True)
class Index:
    """Where the gathered K and V rows lie: the first three coordinates of k and v, each broadcastable to [r, T]."""

    first: torch.Tensor  # request, or physical page
    group: torch.Tensor
    token: torch.Tensor  # token of the request, or of the page
    valid: torch.Tensor | None  # [r, T] bool: the slot holds a selected token; None: all do


def locate(call: Call, selection: Selection, rows: torch.Tensor, begin: int, end: int, masked: bool) -> Index:
    """Find the positions [begin, end) of the rows [r]; slots beyond a row's L are marked invalid and point at token 0.

    Without `masked` the caller knows that every slot holds a selected token.
    """
    position = torch.arange(begin, end, device=rows.device).expand(rows.shape[0], -1).contiguous()
    # position p of a row lies in the first span whose running end is beyond p
    start, span = selection.start[rows], selection.span[rows]
    ends = span.cumsum(1)
    slot = torch.searchsorted(ends, position, right=True).clamp_max_(call.n - 1)
    token = (start - (ends - span)).gather(1, slot).add_(position)
    valid = None
    if masked:
        valid = position < selection.length[rows].unsqueeze(1)
        token.masked_fill_(~valid, 0)
    group = (rows % call.G).unsqueeze(1)
    request = torch.div(rows, call.S * call.G, rounding_mode="floor").unsqueeze(1)
    if call.block_table is None:
        return Index(request, group, token, valid)

    page = torch.div(token, call.page_size, rounding_mode="floor")
    table_row = request if call.table_rows is None else _table_row(call)[request]
    physical = call.block_table[table_row, page].to(torch.int64)
    if valid is not None:
        valid = valid & (physical >= 0) & (physical < call.num_pages)
        physical = physical.masked_fill_(~valid, 0)
    return Index(physical, group, token.sub_(page, alpha=call.page_size), valid)


def gather(call: Call, name: str, index: Index, count: Counters, width: int = 0) -> torch.Tensor:
    """Gather the rows [r, T, max(D, width)] of k or v, whatever its strides; added columns and invalid slots are 0.

    An invalid slot must be zero and not just masked: its probability is 0, and 0 * NaN is NaN. What is gathered from a
    float8 cache is widened to fp32 and multiplied by its scales, so that no more than the selected rows ever is.
    """
    # One view whose row i starts i units into the tensor, the unit dividing every stride: index_select on it
    # copies whole rows and K or V itself is never copied, which indexing by three coordinates does more slowly.
    tensor = stored(call, name)
    strides = tensor.stride()[:3]
    unit = math.gcd(*strides) or 1
    s0, s1, s2 = (stride // unit for stride in strides)
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape[:3], (s0, s1, s2), strict=True))
    table = tensor.as_strided((last + 1, tensor.shape[3]), (unit, 1))
    flat = index.first * s0 + index.group * s1 + index.token * s2
    D = tensor.shape[3]
    count.gathered_bytes += flat.numel() * D * tensor.element_size()
    if torch.is_grad_enabled() and tensor.requires_grad:  # the backward pass is to be differentiated: no out= then
        result = torch.index_select(table, 0, flat.reshape(-1))
    else:
        result = call.q.new_empty((flat.numel(), max(D, width)))
        result[:, D:].zero_()
        if call.fp8:
            widen(torch.index_select(table, 0, flat.reshape(-1)), result[:, :D])
            if (scale := scales(call, name)) is not None:
                result[:, :D].mul_(scale[index.first, index.group, index.token].expand(flat.shape).reshape(-1, 1))
            elif name == "v" and call.v_factor != 1:
                result.mul_(call.v_factor)
        else:
            torch.index_select(table, 0, flat.reshape(-1), out=result[:, :D])
    result = result.view(*flat.shape, -1)
    return result if index.valid is None else result.masked_fill_(~index.valid.unsqueeze(-1), 0)


def stored(call: Call, name: str) -> torch.Tensor:
    """Return k or v, of a float8 cache its bytes: not every operator takes float8."""
    tensor: torch.Tensor = getattr(call, name)
    return tensor.view(torch.uint8) if call.fp8 else tensor


def scales(call: Call, name: str) -> torch.Tensor | None:
    """Return k_scale or v_scale as a view in the shape of the first three dimensions of k or v."""
    scale: torch.Tensor | None = call.k_scale if name == "k" else call.v_scale
    if scale is None or scale.dim() == 3:
        return scale
    return scale.view(1, -1, 1).expand(getattr(call, name).shape[:3])


@functools.cache
def _values() -> torch.Tensor:
    """Return what each byte means as float8_e4m3fn, fp32 [256]."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.float32)


def widen(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Write the values of float8_e4m3fn bytes [N, D] to out [N, D], fp32."""
    if rows.device.type != "cpu":
        out.copy_(rows.view(torch.float8_e4m3fn))
        return
    # six times as fast as PyTorch's conversion, which takes one element after another
    places = rows.view(-1).to(torch.int32)
    if out.is_contiguous():
        torch.index_select(_values(), 0, places, out=out.view(-1))
    else:
        out.copy_(torch.index_select(_values(), 0, places).view(out.shape))

"""Packed SDPA on the CPU: a few rows at a time, gathered into a buffer that stays in the second-level cache.

What a step gathers is attended while it is still in the cache, so that the selected rows cross the memory bus once.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsa_sel.backends._gather import Counters, Selection, scales, stored, widen
from nsa_sel.backends._plan import Chunk
from nsa_sel.call import Call

_UNIT = 64  # the most tokens copied as one
_SERIAL = 32768  # elements: index_select copies what is larger one after another
_FEW = 64  # tokens
_KEPT = 4  # steps that the buffer which a thread keeps may hold at most; a larger one lives as long as its call
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_kept = threading.local()


@functools.cache
def cache_bytes() -> int:
    """Return the size of a core's second-level cache as the system states it, 1 MB where it states none."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20


def attend(
    call: Call, selection: Selection, rows: np.ndarray, lengths: np.ndarray, chunk: Chunk, count: Counters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the rows [r], in descending order of their lengths [r], all of which select something.

    Returns:
        out [r, h, Dv] and lse [r, h] in fp32 or fp64, or out in q's dtype. A row is to be trusted where all of it is
        finite, and nowhere else: the fused attention turns an infinite logit of half inputs into 0.
    """
    token_bytes = 2 * max(call.Dk, call.Dv) * call.q.element_size()
    longest = max(_UNIT, cache_bytes() // token_bytes)  # tokens of a part
    if call.batch_invariant:  # one step of one shape that follows from the chunk's, whatever the rows hold
        return _attend_alike(call, selection, rows, lengths, chunk.tokens, -(-chunk.tokens // longest), True, count)
    results = []
    begin = 0
    while begin < rows.size:
        parts = -(-int(lengths[begin]) // longest)
        end = int(np.searchsorted(-lengths, -(parts - 1) * longest, side="left"))
        these = slice(begin, end)
        tokens = int(lengths[begin])
        masked = chunk.masked and (bool(lengths[end - 1] != tokens) or selection.bad_page is not None)
        results.append(_attend_alike(call, selection, rows[these], lengths[these], tokens, parts, masked, count))
        begin = end
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _attend_alike(
    call: Call,
    selection: Selection,
    rows: np.ndarray,
    lengths: np.ndarray,
    tokens: int,
    parts: int,
    masked: bool,
    count: Counters,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend rows [r] of up to `tokens` tokens, each in the same number of parts that are merged in the end."""
    places = _locate(call, selection, rows, tokens, parts, masked)
    width = max(call.Dk, call.Dv)  # the fused attention wants Dk = Dv: columns of zeros change nothing
    queries = call.q.reshape(call.rows, 1, call.h, call.Dk)
    if rows.size != call.rows or (rows[1:] <= rows[:-1]).any():  # not all of them, one after another
        queries = queries[torch.from_numpy(rows)]
    if width > call.Dk:
        queries = torch.nn.functional.pad(queries, (0, width - call.Dk))
    if parts > 1:
        queries = queries.repeat_interleave(parts, 0)
    step = queries.shape[0]
    if not call.batch_invariant:
        part_bytes = places.tokens * 2 * width * call.q.element_size()
        step = min(step, torch.get_num_threads() * max(1, cache_bytes() // part_bytes))
    keys, values = _buffers(call.q.dtype, step * places.tokens, call.Dk, call.Dv)
    # the fused attention takes exponentials of half inputs to 5e-5, which lse shows where few tokens are summed
    shortest = tokens if call.batch_invariant else int(lengths[-1])
    coarse = call.return_lse and call.q.element_size() == 2 and shortest <= _FEW
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    k = v = keys
    for q, key_index, value_index, bias in places.steps(queries, step):
        shape = (q.shape[0], 1, places.tokens, width)
        if k.shape != shape:
            k, v = keys[: math.prod(shape)].view(shape), values[: math.prod(shape)].view(shape)
            flat_k = k.view(key_index.numel(), -1)[:, : places.keys.shape[1]]
            flat_v = v.view(value_index.numel(), -1)[:, : places.values.shape[1]]
        if call.fp8:
            done = len(outs) * step
            widen(torch.index_select(places.keys, 0, key_index), flat_k)
            widen(torch.index_select(places.values, 0, value_index), flat_v)
            for wide, D, factors in ((k, call.Dk, places.key_scales), (v, call.Dv, places.value_scales)):
                if factors is not None:  # the other columns stay zeros: 0 * NaN is NaN
                    wide[..., :D].mul_(factors[done : done + len(q)])
        else:
            torch.index_select(places.keys, 0, key_index, out=flat_k)
            torch.index_select(places.values, 0, value_index, out=flat_v)
        out, lse = _attention(q, k, v, attn_mask=bias, scale=call.scale)
        if coarse:
            logits = torch.matmul(q.float(), k.float().mT).mul_(call.scale)
            lse = torch.logsumexp(logits if bias is None else logits.add_(bias), -1)
        outs.append(out)
        lses.append(lse)
    count.chunks += len(outs)
    slots = queries.shape[0] * places.tokens
    count.gathered_bytes += slots * (call.Dk + call.Dv) * call.k.element_size()
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    lse = lses[0] if len(lses) == 1 else torch.cat(lses)
    if places.bias is not None and selection.bad_page is not None:
        # a part whose pages are all missing: the fused attention leaves what it wants there
        nothing = (places.bias == -math.inf).all(3)
        out.masked_fill_(nothing.unsqueeze(-1), 0)
        lse.masked_fill_(nothing, -math.inf)
    out = out.view(rows.size, parts, call.h, width)[..., : call.Dv]
    if call.v_factor != 1:
        out.mul_(call.v_factor)
    lse = lse.view(rows.size, parts, call.h)
    if parts == 1:
        return out[:, 0], lse[:, 0]
    total = torch.logsumexp(lse, 1)
    return out.to(lse.dtype).mul_(torch.exp(lse - total.unsqueeze(1)).unsqueeze(-1)).sum(1), total


def _buffers(dtype: torch.dtype, slots: int, Dk: int, Dv: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory [slots * max(Dk, Dv)] for K and for V, the columns of the narrower one filled up with zeros.

    It is this thread's own and kept from call to call where it is small; nobody writes to the zeros.
    """
    width, narrow = max(Dk, Dv), min(Dk, Dv)
    size = slots * width * dtype.itemsize
    half = -(-size // 64) * 64
    shape = (dtype, slots, Dk, Dv)
    kept, zeros = getattr(_kept, "buffer", None), getattr(_kept, "shape", None)
    if kept is None or kept.numel() < 2 * half:
        with torch.inference_mode(False):  # what is made inside of it cannot be written to outside of it
            kept = torch.empty(2 * half, dtype=torch.uint8, device="cpu")
        zeros = None
        if 2 * half <= _KEPT * torch.get_num_threads() * cache_bytes():
            _kept.buffer = kept
    keys, values = kept[:size].view(dtype), kept[half : half + size].view(dtype)
    if zeros != shape:
        _kept.shape = None
        if narrow < width:
            (keys if Dk < Dv else values).view(-1, width)[:, narrow:].zero_()
        if kept is getattr(_kept, "buffer", None):
            _kept.shape = shape
    return keys, values


@dataclass(slots=True)
class _Places:
    """Where the tokens of each part lie: rows of overlapping tables, each of one or more tokens."""

    tokens: int  # slots of a part
    keys: torch.Tensor  # [places, tokens copied as one * Dk]
    values: torch.Tensor
    key_index: torch.Tensor  # [parts of all rows, copies] int64
    value_index: torch.Tensor
    key_scales: torch.Tensor | None  # fp32 [parts of all rows, 1, slots, 1], of a float8 cache
    value_scales: torch.Tensor | None
    bias: torch.Tensor | None  # [parts of all rows, 1, 1, slots]: 0, or -inf where no token is selected; None: all are

    def steps(self, queries: torch.Tensor, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]]:
        """Yield the queries, the flat indices and the bias of `step` parts at a time."""
        if step >= queries.shape[0]:
            yield queries, self.key_index.view(-1), self.value_index.view(-1), self.bias
            return
        indices = (t.view(-1).split(step * t.shape[1]) for t in (self.key_index, self.value_index))
        biases = itertools.repeat(None) if self.bias is None else self.bias.split(step)
        yield from zip(queries.split(step), *indices, biases)  # noqa: B905 - the last one may be endless


def _locate(call: Call, selection: Selection, rows: np.ndarray, tokens: int, parts: int, masked: bool) -> _Places:
    """Find the rows' tokens, as many as all spans (and pages) are made of at a time.

    A slot without a selected token points at the row's last one: its probability is 0, and 0 * NaN of any other is NaN.
    """
    start, span = selection.start.numpy()[rows], selection.span.numpy()[rows]  # [r, n]
    unit = _unit(start, span, call.page_size)
    # slots of a part: a multiple of what is copied as one, which the company of a row may make smaller
    multiple = _UNIT if call.batch_invariant else unit
    slots = -(-tokens // (parts * multiple)) * multiple
    units = parts * slots // unit  # of a row
    masked = masked or parts * slots != tokens
    pieces = span // unit
    ends = pieces.cumsum(1)
    shift = start // unit - (ends - pieces)
    if masked:
        used = ends[:, -1:]
        pieces = np.concatenate([pieces, units - used], 1)
        shift = np.concatenate([shift, shift[:, :1]], 1)
    piece = np.repeat(shift.ravel(), pieces.ravel()).reshape(rows.size, units)
    piece += np.arange(units)
    valid = None
    if masked:
        valid = np.arange(units) < used
        piece = np.where(valid, piece, np.take_along_axis(piece, used - 1, 1))
    first = (rows // (call.S * call.G))[:, None]
    if call.block_table is not None:
        page, piece = np.divmod(piece, call.page_size // unit)
        if call.table_rows is not None:
            first = call.table_rows.numpy().clip(0, call.num_tables - 1)[first]
        first = call.block_table.numpy()[first, page].astype(np.int64)
        if valid is not None:
            there = (first >= 0) & (first < call.num_pages)
            valid &= there
            first[~there] = 0
    group = (rows % call.G)[:, None]
    k, v = stored(call, "k"), stored(call, "v")
    keys, key_index = _table(k, first, group, piece, unit, call.Dk >= call.Dv)
    if v.shape == k.shape and v.stride() == k.stride():
        values, value_index = v.as_strided(keys.shape, keys.stride()), key_index
    else:
        values, value_index = _table(v, first, group, piece, unit, call.Dv >= call.Dk)
    alike = (rows.size * parts, -1)
    factors: dict[str, torch.Tensor] = {}
    for name in ("k", "v") if call.fp8 else ():
        if (scale := scales(call, name)) is not None:
            table, index = _table(scale.unsqueeze(3), first, group, piece, unit, True)
            factors[name] = torch.index_select(table, 0, index.view(-1)).view(rows.size * parts, 1, -1, 1)
    bias = None
    if valid is not None:
        valid = valid.repeat(unit, 1).reshape(rows.size * parts, 1, 1, -1)
        bias = torch.zeros(valid.shape, dtype=call.q.dtype, device="cpu")
        bias.masked_fill_(torch.from_numpy(~valid), -math.inf)
    key_index, value_index = key_index.view(alike), value_index.view(alike)
    return _Places(slots, keys, values, key_index, value_index, factors.get("k"), factors.get("v"), bias)


def _unit(start: np.ndarray, span: np.ndarray, others: int) -> int:
    """Return the largest power of two up to `_UNIT` of which all spans, their starts and the others are multiples."""
    bits = int(np.bitwise_or.reduce(np.where(span > 0, start | span, 0), axis=None)) | others | _UNIT
    return bits & -bits


def _table(
    tensor: torch.Tensor, first: np.ndarray, group: np.ndarray, piece: np.ndarray, unit: int, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out one cache so that row i of the table starts i steps into it, the step dividing every stride.

    Args:
        piece: [r, units] of `unit` tokens each, of a request or page `first`.
        whole: the buffer is no wider than D, so that tokens which follow each other may be copied as one.
    """
    D = tensor.shape[3]
    strides = tensor.stride()[:3]
    step = math.gcd(*strides) or 1
    s0, s1, s2 = (stride // step for stride in strides)
    index = piece * (s2 * unit) + (first * s0 + group * s1)
    if unit > 1 and (not whole or strides[2] != D or unit * D >= _SERIAL):
        index = (index[:, :, None] + np.arange(unit) * s2).reshape(len(index), -1)
        unit = 1
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape[:3], (s0, s1, s2), strict=True))
    places = last + 1 - (unit - 1) * s2
    return tensor.as_strided((places, unit * D), (step, 1)), torch.from_numpy(index)

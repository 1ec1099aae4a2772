# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels: one program serves one row (b, s, g), that is, all the heads of a group at once.

Both take the exact softmax in two passes over the row's tokens: the first finds the maximum and the sum of every head,
the second weighs the values and keeps the result in registers until it is written, once. Nothing is shared between
programs, so a row's bits depend on nothing but the row.

`dense` is for one span a row: its tokens are neighbours. `varlen` packs any number of spans into full tiles.
Shapes of blocks: H heads, N tokens, D columns of K, E columns of V, C spans; all powers of two, padded and masked.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

# Sizes that differ from call to call must not each compile a kernel of their own.
_SIZES = ["S", "G", "h", "S_kv", "n", "num_pages", "num_tables", "block_size"]


@triton.jit
def _row(row, S, G):
    """Return (b, s, g) of a program, in 64 bits: they are multiplied by strides."""
    g = row % G
    rest = row // G
    return (rest // S).to(tl.int64), (rest % S).to(tl.int64), g.to(tl.int64)


@triton.jit
def _kv_len(seq_lens, seq_stride, b, s, S, S_kv, there, CAUSAL: tl.constexpr):
    """Return how many tokens query s of batch entry b sees, int64; none where the entry has no pages."""
    seq = S_kv.to(tl.int64)
    if seq_lens is not None:
        seq = tl.minimum(tl.maximum(tl.load(seq_lens + b * seq_stride).to(tl.int64), 0), S_kv)
    seq = tl.where(there, seq, 0)
    if CAUSAL:
        seq = tl.maximum(seq - S + s + 1, 0)
    return seq


@triton.jit
def _table_row(table_rows, table_rows_stride, b, num_tables):
    """Return the row of the page table that batch entry b uses, int64, and whether there is one."""
    table_row = b
    if table_rows is not None:
        table_row = tl.load(table_rows + b * table_rows_stride).to(tl.int64)
        there = (table_row >= 0) & (table_row < num_tables)
        return tl.where(there, table_row, 0), there
    return table_row, b >= 0


@triton.jit
def _slots(counts, counts_strides, b, s, g, n):
    """Return how many slots of row (b, s, g) are in use, int32."""
    used = n
    if counts is not None:
        place = counts + b * counts_strides[0] + s * counts_strides[1] + g * counts_strides[2]
        used = tl.minimum(tl.maximum(tl.load(place), 0), n)
    return used


@triton.jit
def _spans(selection, stride, first, n, S_kv, block_size, kv_len, BLOCKS: tl.constexpr, C: tl.constexpr):
    """Return start and length [C], int32, of the spans from slot `first` on, clamped to [0, kv_len)."""
    slot = first + tl.arange(0, C)
    used = slot < n
    place = selection + slot.to(tl.int64) * stride
    if BLOCKS:
        ids = tl.load(place, mask=used, other=-1).to(tl.int64)
        # both factors are cut to S_kv < 2^31, so that the product cannot leave 64 bits
        start = tl.minimum(tl.maximum(ids, 0), S_kv) * block_size
        end = tl.where(ids < 0, start, start + block_size)
    else:
        start = tl.load(place, mask=used, other=0).to(tl.int64)
        end = tl.load(place + 1, mask=used, other=0).to(tl.int64)
    # both ends are clamped before they are subtracted: the smallest int64 minus anything would wrap around
    start = tl.minimum(tl.maximum(start, 0), kv_len)
    end = tl.minimum(tl.maximum(end, 0), kv_len)
    return start.to(tl.int32), tl.maximum(end - start, 0).to(tl.int32)


@triton.jit
def _packed(position, start, length):
    """Return the tokens [N] at these positions of the concatenated spans; 0 beyond the last."""
    end = tl.cumsum(length, 0)
    begin = end - length
    inside = (position[:, None] >= begin[None, :]) & (position[:, None] < end[None, :])
    return tl.sum(tl.where(inside, position[:, None] + (start - begin)[None, :], 0), 1)


@triton.jit
def _places(token, valid, table, table_stride, num_pages, PAGE_SIZE: tl.constexpr):
    """Return the tokens' pages (0 where there are none) and places inside, int64 [N], and which of them are there."""
    inside = token.to(tl.int64)
    pool = inside * 0
    if PAGE_SIZE > 0:
        page = token // PAGE_SIZE
        physical = tl.load(table + page.to(tl.int64) * table_stride, mask=valid, other=-1)
        valid = valid & (physical >= 0) & (physical < num_pages)
        pool = tl.where(valid, physical, 0).to(tl.int64)
        inside -= page.to(tl.int64) * PAGE_SIZE
    return pool, inside, valid


@triton.jit
def _for_dot(x, INTERPRETED: tl.constexpr):
    """Return what `tl.dot` takes: the interpreter multiplies the bits of bf16 as integers, so it gets fp32."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round fp32 to the nearest value of `dtype`; the interpreter would cut the bits of bf16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # NaN must not be carried over into an infinity or a zero
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(dtype)
    return x.to(dtype)


@triton.jit
def _widened(code):
    """Return the values of float8_e4m3fn codes, uint8, in fp32: shifted, a code is fp16's for 1/256 of it.

    Integer operations, as compute capability 8.0 and 8.6 have no conversion.
    """
    code = code.to(tl.uint16)
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _factors(scale, strides, pool, inside, valid):
    """Return the scales [N] of a float8 cache's tokens."""
    return tl.load(scale + pool * strides[0] + inside * strides[2], mask=valid, other=0.0)


@triton.jit
def _logits(
    q, q_stride, k, k_strides, k_scale, k_scale_strides, pool, inside, valid, h, scale,
    DK: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    FP8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return log2(e) * scale * q k^T [H, N] in fp32, -inf where a token is not valid."""
    head = tl.arange(0, H)
    k_place = pool * k_strides[0] + inside * k_strides[2]
    logits = tl.zeros((H, N), tl.float32)
    for first in tl.static_range(0, DK, D):
        column = first + tl.arange(0, D)
        rows = tl.load(
            q + head[:, None] * q_stride + column[None, :],
            mask=(head < h)[:, None] & (column < DK)[None, :],
            other=0.0,
        )
        # invalid columns must be zeros and not just masked afterwards: they may hold NaN
        keys = tl.load(k + k_place[None, :] + column[:, None], mask=valid[None, :] & (column < DK)[:, None], other=0)
        if FP8:
            keys = _widened(keys).to(q.dtype.element_ty)  # exactly
        logits = tl.dot(_for_dot(rows, INTERPRETED), _for_dot(keys, INTERPRETED), logits)
    logits *= scale
    if k_scale is not None:
        logits *= _factors(k_scale, k_scale_strides, pool, inside, valid)[None, :]
    return tl.where(valid[None, :], logits, float("-inf"))


@triton.jit
def _finite(x):
    """Return 0 for an infinite maximum, so that it may be subtracted: (-inf) - (-inf) and inf - inf are NaN."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _count(logits, top, total):
    """First pass: take the logits [H, N] into the maximum and the sum of exponentials [H]."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = _finite(new_top)
    return new_top, total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)


@triton.jit
def _weigh(
    logits, top, v, v_strides, v_scale, v_scale_strides, pool, inside, valid, result,
    DV: tl.constexpr, E: tl.constexpr, dtype: tl.constexpr, FP8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Second pass: add the values of one tile, weighed, to the result [H, E]."""
    column = tl.arange(0, E)
    v_place = pool * v_strides[0] + inside * v_strides[2]
    values = tl.load(v + v_place[:, None] + column[None, :], mask=valid[:, None] & (column < DV)[None, :], other=0)
    if FP8:
        values = _widened(values)
        if v_scale is not None:  # on the values: a weight times a small scale would leave fp16's range
            values *= _factors(v_scale, v_scale_strides, pool, inside, valid)[:, None]
        values = _rounded(values, dtype, INTERPRETED)
    weights = _rounded(tl.exp2(logits - _finite(top)[:, None]), dtype, INTERPRETED)
    return tl.dot(_for_dot(weights, INTERPRETED), _for_dot(values, INTERPRETED), result)


@triton.jit
def _write(
    out, out_stride, lse, row, top, total, result, v_factor, h,
    DV: tl.constexpr, H: tl.constexpr, E: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the row's out, and lse where it is asked for; a row without any token gives 0 and -inf."""
    head, column = tl.arange(0, H), tl.arange(0, E)
    nothing = total == 0.0
    divisor = tl.where(nothing, 1.0, total)
    tl.store(
        out + head[:, None] * out_stride + column[None, :],
        _rounded(result / divisor[:, None] * v_factor, out.dtype.element_ty, INTERPRETED),
        mask=(head < h)[:, None] & (column < DV)[None, :],
    )
    if lse is not None:
        ln_2: tl.constexpr = 0.6931471805599453
        natural = (_finite(top) + tl.log2(divisor)) * ln_2
        tl.store(lse + row.to(tl.int64) * h + head, tl.where(nothing, float("-inf"), natural), mask=head < h)


@triton.jit(do_not_specialize=_SIZES)
def dense(
    q, k, v, selection, counts, seq_lens, table, table_rows, k_scale, v_scale, out, lse,
    q_strides, k_strides, v_strides, sel_strides, out_strides, counts_strides, seq_stride, table_strides,
    table_rows_stride, k_scale_strides, v_scale_strides,
    S, G, h, S_kv, n, num_pages, num_tables, block_size, scale, v_factor,
    DK: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCKS: tl.constexpr, CAUSAL: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    FP8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend rows of one span (n = 1)."""
    row = tl.program_id(0)
    b, s, g = _row(row, S, G)
    table_row, there = _table_row(table_rows, table_rows_stride, b, num_tables)
    kv_len = _kv_len(seq_lens, seq_stride, b, s, S, S_kv, there, CAUSAL)
    used = _slots(counts, counts_strides, b, s, g, n)
    selection += b * sel_strides[0] + s * sel_strides[1] + g * sel_strides[2]
    starts, lengths = _spans(selection, sel_strides[3], 0, used, S_kv, block_size, kv_len, BLOCKS, C)
    start, L = tl.sum(starts, 0), tl.sum(lengths, 0)  # unused slots hold zeros

    q += b * q_strides[0] + s * q_strides[1] + g * q_strides[2]
    k += g * k_strides[1]
    v += g * v_strides[1]
    if k_scale is not None:
        k_scale += g * k_scale_strides[1]
    if v_scale is not None:
        v_scale += g * v_scale_strides[1]
    if PAGE_SIZE == 0:
        k += b * k_strides[0]
        v += b * v_strides[0]
        if k_scale is not None:
            k_scale += b * k_scale_strides[0]
        if v_scale is not None:
            v_scale += b * v_scale_strides[0]
    else:
        table += table_row * table_strides[0]

    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    for first in range(0, L, N):
        position = first + tl.arange(0, N)
        pool, inside, valid = _places(start + position, position < L, table, table_strides[1], num_pages, PAGE_SIZE)
        logits = _logits(
            q, q_strides[3], k, k_strides, k_scale, k_scale_strides, pool, inside, valid, h, scale,
            DK, H, N, D, FP8, INTERPRETED,
        )  # fmt: skip
        top, total = _count(logits, top, total)

    result = tl.zeros((H, E), tl.float32)
    for first in range(0, L, N):
        position = first + tl.arange(0, N)
        pool, inside, valid = _places(start + position, position < L, table, table_strides[1], num_pages, PAGE_SIZE)
        logits = _logits(
            q, q_strides[3], k, k_strides, k_scale, k_scale_strides, pool, inside, valid, h, scale,
            DK, H, N, D, FP8, INTERPRETED,
        )  # fmt: skip
        result = _weigh(
            logits, top, v, v_strides, v_scale, v_scale_strides, pool, inside, valid, result,
            DV, E, q.dtype.element_ty, FP8, INTERPRETED,
        )  # fmt: skip

    out += b * out_strides[0] + s * out_strides[1] + g * out_strides[2]
    _write(out, out_strides[3], lse, row, top, total, result, v_factor, h, DV, H, E, INTERPRETED)


@triton.jit(do_not_specialize=_SIZES)
def varlen(
    q, k, v, selection, counts, seq_lens, table, table_rows, k_scale, v_scale, out, lse,
    q_strides, k_strides, v_strides, sel_strides, out_strides, counts_strides, seq_stride, table_strides,
    table_rows_stride, k_scale_strides, v_scale_strides,
    S, G, h, S_kv, n, num_pages, num_tables, block_size, scale, v_factor,
    DK: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCKS: tl.constexpr, CAUSAL: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    FP8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend rows of any number of spans, C at a time; only the last tile of each C spans is not full.

    Lengths of C spans add up in 32 bits: the caller keeps C * S_kv below 2^31.
    """
    row = tl.program_id(0)
    b, s, g = _row(row, S, G)
    table_row, there = _table_row(table_rows, table_rows_stride, b, num_tables)
    kv_len = _kv_len(seq_lens, seq_stride, b, s, S, S_kv, there, CAUSAL)
    used = _slots(counts, counts_strides, b, s, g, n)
    selection += b * sel_strides[0] + s * sel_strides[1] + g * sel_strides[2]

    q += b * q_strides[0] + s * q_strides[1] + g * q_strides[2]
    k += g * k_strides[1]
    v += g * v_strides[1]
    if k_scale is not None:
        k_scale += g * k_scale_strides[1]
    if v_scale is not None:
        v_scale += g * v_scale_strides[1]
    if PAGE_SIZE == 0:
        k += b * k_strides[0]
        v += b * v_strides[0]
        if k_scale is not None:
            k_scale += b * k_scale_strides[0]
        if v_scale is not None:
            v_scale += b * v_scale_strides[0]
    else:
        table += table_row * table_strides[0]

    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    for slot in range(0, used, C):
        starts, lengths = _spans(selection, sel_strides[3], slot, used, S_kv, block_size, kv_len, BLOCKS, C)
        L = tl.sum(lengths, 0)  # of these C spans
        for first in range(0, L, N):
            position = first + tl.arange(0, N)
            token = _packed(position, starts, lengths)
            pool, inside, valid = _places(token, position < L, table, table_strides[1], num_pages, PAGE_SIZE)
            logits = _logits(
            q, q_strides[3], k, k_strides, k_scale, k_scale_strides, pool, inside, valid, h, scale,
            DK, H, N, D, FP8, INTERPRETED,
        )  # fmt: skip
            top, total = _count(logits, top, total)

    result = tl.zeros((H, E), tl.float32)
    for slot in range(0, used, C):
        starts, lengths = _spans(selection, sel_strides[3], slot, used, S_kv, block_size, kv_len, BLOCKS, C)
        L = tl.sum(lengths, 0)  # of these C spans
        for first in range(0, L, N):
            position = first + tl.arange(0, N)
            token = _packed(position, starts, lengths)
            pool, inside, valid = _places(token, position < L, table, table_strides[1], num_pages, PAGE_SIZE)
            logits = _logits(
            q, q_strides[3], k, k_strides, k_scale, k_scale_strides, pool, inside, valid, h, scale,
            DK, H, N, D, FP8, INTERPRETED,
        )  # fmt: skip
            result = _weigh(
            logits, top, v, v_strides, v_scale, v_scale_strides, pool, inside, valid, result,
            DV, E, q.dtype.element_ty, FP8, INTERPRETED,
        )  # fmt: skip

    out += b * out_strides[0] + s * out_strides[1] + g * out_strides[2]
    _write(out, out_strides[3], lse, row, top, total, result, v_factor, h, DV, H, E, INTERPRETED)


INTERPRETED = not isinstance(dense, JITFunction)

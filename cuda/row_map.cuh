// row_map.cuh - from a row's selection to one K/V row address per selected token.
//
// The clamped spans of a row concatenate; position p of that sequence is the p-th selected token. A warp holds 32 spans
// at a time, one a lane, with their running ends, and resolves 32 positions at once by a binary search over lanes.
#pragma once
#include "traits.cuh"

namespace nsa_sel {

struct RawSpan {
  long long first, second;  // start, end of a range; block id, unused of a block selection
};

// Reads slot i of the row's selection; a slot from `slots` on is unused. Range values are data: anything may stand
// there.
__device__ __forceinline__ RawSpan load_raw_span(const DecodeParams& p, const RowIndex& r, int i, int slots) {
  const bool blocks = p.block_size > 0;
  if (i >= slots) return blocks ? RawSpan{-1, 0} : RawSpan{0, 0};
  const int64_t at = r.b * p.sel_stride_b + r.s * p.sel_stride_s + r.g * p.sel_stride_g + i * p.sel_stride_n;
  if (p.index_is_64) {
    const long long* sel = static_cast<const long long*>(p.selection) + at;
    return {dev::load(sel), blocks ? 0 : dev::load(sel + 1)};
  }
  const int* sel = static_cast<const int*>(p.selection) + at;
  return {dev::load(sel), blocks ? 0 : dev::load(sel + 1)};
}

// What bounds a row's selection, beside the spans themselves.
struct RowLimits {
  int kv_len;  // tokens that the row may see: the clamp's upper end
  int slots;   // of its selection in use
  int table;   // its row of block_table
};
__device__ __forceinline__ RowLimits row_limits(const DecodeParams& p, const RowIndex& r) {
  RowLimits limits{p.S_kv, p.n, r.b};
  if (p.seq_lens != nullptr) limits.kv_len = min(max(dev::load(p.seq_lens + r.b * p.seq_lens_stride), 0), p.S_kv);
  if (p.causal) limits.kv_len = max(0, limits.kv_len - p.S + r.s + 1);
  if (p.counts != nullptr) {
    const int* count = p.counts + r.b * p.counts_stride_b + r.s * p.counts_stride_s + r.g * p.counts_stride_g;
    limits.slots = min(max(dev::load(count), 0), p.n);
  }
  if (p.table_rows != nullptr) {
    limits.table = dev::load(p.table_rows + r.b * p.table_rows_stride);
    if (uint32_t(limits.table) >= uint32_t(p.num_tables)) limits.slots = 0;  // no such row: nothing is selected
  }
  return limits;
}

struct Span {
  int start, length;
};

__device__ __forceinline__ Span clamp_span(const DecodeParams& p, const RawSpan& raw, int kv_len) {
  long long start, end;
  if (p.block_size > 0) {
    // Compare ids before multiplying: id * block_size may not fit 64 bits, id <= kv_len / block_size does.
    if (raw.first < 0 || raw.first > kv_len / p.block_size) return {0, 0};
    start = raw.first * p.block_size;
    end = min(start + p.block_size, static_cast<long long>(kv_len));
  } else {
    start = max(raw.first, 0ll);
    // Without the lower bound the compiler tests end - start > 0, which overflows for an end of -2^63.
    end = min(max(raw.second, 0ll), static_cast<long long>(kv_len));
  }
  return end > start ? Span{int(start), int(end - start)} : Span{0, 0};
}

// 32 neighbouring spans of a row, one a lane.
struct SpanChunk {
  Span span;
  long long end;    // tokens of the row up to and with this lane's span
  long long total;  // ... up to and with the last lane's
  int next;         // index of the first span behind this chunk

  // Starts at span `first`, behind `before` tokens.
  __device__ __forceinline__ void scan(const DecodeParams& p, const RawSpan& raw, const RowLimits& limits, int first,
                                       long long before) {
    const int lane = threadIdx.x & 31;
    span = first + lane < limits.slots ? clamp_span(p, raw, limits.kv_len) : Span{0, 0};
    end = span.length;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const long long left = __shfl_up_sync(0xffffffffu, end, step);
      if (lane >= step) end += left;
    }
    end += before;
    total = __shfl_sync(0xffffffffu, end, 31);
    next = first + 32;
  }

  // The token at position `at` (from the segment's first position `from`); every lane of the warp must call.
  __device__ __forceinline__ int token_at(long long from, int at) const {
    // Positions relative to the segment fit 32 bits; ends outside of it saturate and keep their order.
    const int relative_end = int(min(max(end - from, -1ll), 1ll << 30));
    const int token_of_zero =
        int(span.start + span.length - (end - from));  // meaningful where the span meets the segment
    int j = 0;                                         // count of spans that end at or before `at`
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (__shfl_sync(0xffffffffu, relative_end, j + step - 1) <= at) j += step;
    }
    return __shfl_sync(0xffffffffu, token_of_zero, j) + at;
  }
};

// Offsets of one token's K and V row from the segment's bases, in units of 1 << unit_shift bytes.
struct RowOffsets {
  uint32_t k, v;
};
__device__ __forceinline__ RowOffsets resolve_token(const DecodeParams& p, int table, int token) {
  uint32_t page = 0, in_page = uint32_t(token);
  if (p.page_size > 0) {
    const uint32_t logical = uint32_t(token) / uint32_t(p.page_size);
    in_page = uint32_t(token) - logical * uint32_t(p.page_size);
    page = uint32_t(dev::load(p.block_table + table * p.table_stride + logical));
    if (page >= uint32_t(p.num_pages)) return {kNoRow, kNoRow};  // the caller's mistake: not selected, never followed
  }
  return {page * p.k_unit_page + in_page * p.k_unit_token, page * p.v_unit_page + in_page * p.v_unit_token};
}

}  // namespace nsa_sel

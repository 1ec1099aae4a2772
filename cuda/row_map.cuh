// row_map.cuh - from a row's selection to one K/V row address per selected token.
//
// The clamped spans of a row concatenate; position p of that sequence is the p-th selected token. A warp holds up to 32
// spans at a time, one a lane, and resolves 32 positions at once.
#pragma once
#include "traits.cuh"

namespace nsa_sel {

constexpr unsigned kAllLanes = 0xffffffffu;

// One slot of a selection as it comes from memory: widening it at the load would wait for it there, before the other
// loads of the row are asked for.
struct RawSlot {
  uint32_t words[4];  // int32: first, second; int64: low and high word of first, then of second
};

__device__ __forceinline__ const char* selection_of(const DecodeParams& p, const RowIndex& r) {
  return static_cast<const char*>(p.selection) + uint32_t(r.b) * p.sel_bytes_b + uint32_t(r.s) * p.sel_bytes_s +
         uint32_t(r.g) * p.sel_bytes_g;
}

// Slot i of the row's selection, nothing from `slots` on. kWords: 2 are enough for block ids and for int32 ranges.
template <int kWords>
__device__ __forceinline__ RawSlot load_slot(const DecodeParams& p, const char* selection, uint32_t i, int slots) {
  RawSlot raw{};
  if (i < uint32_t(slots)) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(selection + i * p.sel_bytes_n);
    const bool ranges = p.block_size == 0;
    raw.words[0] = dev::load(words);
    if (ranges || p.index_is_64) raw.words[1] = dev::load(words + 1);
    if (kWords == 4 && ranges && p.index_is_64) {
      raw.words[2] = dev::load(words + 2);
      raw.words[3] = dev::load(words + 3);
    }
  }
  return raw;
}

// What bounds a row's selection, beside the spans themselves.
struct RowLimits {
  int kv_len;  // tokens that the row may see: the clamp's upper end
  int slots;   // of its selection in use
  int table;   // its row of block_table
};

// Everything that the map of a row depends on, asked for at once; nothing is looked at before.
struct RawRow {
  RawSlot slot;  // the lane's of the first chunk
  int seq_len, count, table;
};
__device__ __forceinline__ RawRow load_row(const DecodeParams& p, const RowIndex& r) {
  RawRow raw{{}, p.S_kv, p.n, r.b};
  // Addresses first, of tensors that are not there as well: under a predicate even their strides would be waited for.
  const int* seq_len = dev::keep(p.seq_lens + uint32_t(r.b) * p.seq_lens_stride);
  const int* count = dev::keep(p.counts + uint32_t(r.b) * p.counts_stride_b + uint32_t(r.s) * p.counts_stride_s +
                               uint32_t(r.g) * p.counts_stride_g);
  const int* table = dev::keep(p.table_rows + uint32_t(r.b) * p.table_rows_stride);
  raw.slot = load_slot<4>(p, selection_of(p, r), threadIdx.x & 31, p.n);
  if (p.seq_lens != nullptr) raw.seq_len = dev::load(seq_len);
  if (p.counts != nullptr) raw.count = dev::load(count);
  if (p.table_rows != nullptr) raw.table = dev::load(table);
  return raw;
}
__device__ __forceinline__ RowLimits row_limits(const DecodeParams& p, const RawRow& raw, int s) {
  RowLimits limits{min(max(raw.seq_len, 0), p.S_kv), min(max(raw.count, 0), p.n), raw.table};
  if (p.causal) limits.kv_len = max(0, limits.kv_len - p.S + s + 1);
  if (p.table_rows != nullptr && uint32_t(raw.table) >= uint32_t(p.num_tables))
    limits.slots = 0;  // nothing is selected
  return limits;
}

struct Span {
  int start, length;
};

// Values are data: anything may stand there. What does not fit 31 bits is as good as 2^31 - 1: beyond every cache.
__device__ __forceinline__ int saturated(uint32_t low, uint32_t high) {
  return int(high) < 0 ? -1 : (high != 0 || int(low) < 0) ? 0x7fffffff : int(low);
}
__device__ __forceinline__ Span block_span(const DecodeParams& p, int block, int kv_len) {
  if (block < 0 || block > p.last_block) return {0, 0};
  const int start = block * p.block_size;  // inside the cache, so it fits
  return {start, max(min(p.block_size, kv_len - start), 0)};
}
__device__ __forceinline__ Span range_span(int first, int last, int kv_len) {
  const int start = max(first, 0);
  // Without the lower bound the compiler tests end - start > 0, which overflows for an end far below.
  const int end = min(max(last, 0), kv_len);
  return {start, max(end - start, 0)};
}
__device__ __forceinline__ Span clamp_span(const DecodeParams& p, const RawSlot& raw, int kv_len) {
  const uint32_t* w = raw.words;
  const int first = p.index_is_64 ? saturated(w[0], w[1]) : int(w[0]);
  if (p.block_size > 0) return block_span(p, first, kv_len);
  return range_span(first, p.index_is_64 ? saturated(w[2], w[3]) : int(w[1]), kv_len);
}

// The spans with tokens of a chunk of slots, one a lane and in order; positions count from the chunk's first token.
struct SpanChunk {
  uint32_t begin;     // first position of the lane's span; beyond every position where there is none
  int token_of_zero;  // position p inside the lane's span is token token_of_zero + p
  int total;          // tokens of the chunk
  int next;           // first slot behind the chunk

  __device__ __forceinline__ void scan(const DecodeParams& p, const RawSlot& raw, const RowLimits& limits, int first) {
    const int lane = threadIdx.x & 31;
    next = first + p.chunk_slots;
    const bool used = lane < p.chunk_slots && first + lane < limits.slots;
    const Span span = used ? clamp_span(p, raw, limits.kv_len) : Span{0, 0};
    int end = span.length;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += left;
    }
    begin = uint32_t(end - span.length);
    token_of_zero = span.start - int(begin);
    const unsigned filled = __ballot_sync(kAllLanes, span.length > 0);
    if ((filled & (filled + 1)) != 0) close_gaps(filled);
    if (lane >= __popc(filled)) begin = 0x7fffffff;
    total = __shfl_sync(kAllLanes, end, 31);
  }

  // Lane i takes the span of the i-th lane that has tokens.
  __device__ __forceinline__ void close_gaps(unsigned filled) {
    const int lane = threadIdx.x & 31;
    int from = 0;  // lanes whose prefix holds at most `lane` filled ones
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (__popc(filled & ((1u << (from + step)) - 1)) <= lane) from += step;
    }
    begin = __shfl_sync(kAllLanes, begin, from);
    token_of_zero = __shfl_sync(kAllLanes, token_of_zero, from);
  }

  // Tokens at kCount windows of 32 positions from `first` on; behind `total` they are meaningless. A window's spans
  // mark where they begin, and a position belongs to the last mark at or before it.
  template <int kCount>
  __device__ __forceinline__ void tokens_at(uint32_t first, uint32_t (&tokens)[kCount]) const {
    const int lane = threadIdx.x & 31;
    unsigned marks[kCount];
    int before[kCount];  // spans that begin before the window
#pragma unroll
    for (int w = 0; w < kCount; ++w) {
      const uint32_t start = first + w * 32, mark = begin - start;
      marks[w] = __reduce_or_sync(kAllLanes, mark < 32 ? 1u << mark : 0u);
      before[w] = __popc(__ballot_sync(kAllLanes, begin < start));
    }
#pragma unroll
    for (int w = 0; w < kCount; ++w) {
      const int span = before[w] + __popc(marks[w] << (31 - lane)) - 1;
      tokens[w] = uint32_t(__shfl_sync(kAllLanes, token_of_zero, span)) + first + w * 32 + lane;
    }
  }
};

// Offsets of one token's K and V row from the segment's bases, in units of 1 << unit_shift bytes, and its place in the
// cache.
struct RowOffsets {
  uint32_t k, v;
  uint32_t page, in_page;  // page 0 where there are none
};

// The rows of the calling lane's tokens at windows of 32, `count` tokens in all; the page lookups travel together.
template <int kCount>
__device__ __forceinline__ void resolve_tokens(const DecodeParams& p, int table, const uint32_t (&tokens)[kCount],
                                               int count, RowOffsets (&rows)[kCount]) {
  if (p.page_size == 0) {
#pragma unroll
    for (int w = 0; w < kCount; ++w) rows[w] = {tokens[w] * p.k_unit_token, tokens[w] * p.v_unit_token, 0, tokens[w]};
    return;
  }
  const int* pages = p.block_table + uint32_t(table) * p.table_stride;
  uint32_t page[kCount], in_page[kCount];
#pragma unroll
  for (int w = 0; w < kCount; ++w) {
    const uint32_t logical = uint32_t(divide(int(tokens[w]), p.by_page));
    in_page[w] = tokens[w] - logical * uint32_t(p.page_size);
    page[w] = 0;
    if (w * 32 + int(threadIdx.x & 31) < count) page[w] = uint32_t(dev::load(pages + logical));
  }
#pragma unroll
  for (int w = 0; w < kCount; ++w) {
    rows[w] = {page[w] * p.k_unit_page + in_page[w] * p.k_unit_token,
               page[w] * p.v_unit_page + in_page[w] * p.v_unit_token, page[w], in_page[w]};
    // The caller's mistake: not selected, never followed.
    if (page[w] >= uint32_t(p.num_pages)) rows[w].k = rows[w].v = kNoRow;
  }
}

// ---- Long selections ------------------------------------------------------------------------------------------------

// Where a slot is two int64, it takes two loads.
__device__ __forceinline__ bool two_loads(const DecodeParams& p) { return p.block_size == 0 && p.index_is_64 != 0; }

// The lane's spans in the chunks of slots from `first` on, kLoads loads at once: `add(i, length)` for chunk i, or,
// where a slot takes two loads, chunk i / 2.
template <int kLoads, class Add>
__device__ __forceinline__ void lengths_of(const DecodeParams& p, const char* selection, const RowLimits& limits,
                                           uint32_t first, const Add& add) {
  // Kept: the compiler would work out all of this at the start of the block, before the first item's map.
  const int lane = threadIdx.x & 31, chunk_slots = dev::keep<true>(p.chunk_slots);
  const bool wide = dev::keep<true>(p.index_is_64) != 0, ranges = dev::keep<true>(p.block_size) == 0;
  const bool halves = ranges && wide, two_words = ranges || wide;
  const int slots = lane < chunk_slots ? limits.slots : 0;
  const int64_t slot_bytes = dev::keep<true>(p.sel_bytes_n), chunk_bytes = chunk_slots * slot_bytes;
  const int64_t steps[2] = {halves ? 8 : chunk_bytes,
                            halves ? chunk_bytes - 8 : chunk_bytes};  // behind even, odd loads
  uint32_t slot = first + lane;                                       // may pass 2^31 behind the last one
  const char* at = selection + slot * slot_bytes;
  uint32_t low[kLoads], high[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    low[i] = high[i] = ~0u;  // no token, as a block and as a range
    const uint32_t* words = reinterpret_cast<const uint32_t*>(at);
    if (slot < uint32_t(slots)) low[i] = dev::load(words);
    if (slot < uint32_t(slots) && two_words) high[i] = dev::load(words + 1);
    at += steps[i % 2];
    if (i % 2 == 1 || !halves) slot += chunk_slots;
  }
  if (wide) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) low[i] = uint32_t(saturated(low[i], high[i]));
  }
  if (halves) {
#pragma unroll
    for (int i = 0; i < kLoads; i += 2) add(i, range_span(int(low[i]), int(low[i + 1]), limits.kv_len).length);
  } else if (ranges) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) add(i, range_span(int(low[i]), int(high[i]), limits.kv_len).length);
  } else {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) add(i, block_span(p, int(low[i]), limits.kv_len).length);
  }
}

// Sums over the warp of values under 2^40: of all lanes, and of the lanes up to the calling one.
__device__ __forceinline__ long long warp_sum(uint64_t value) {
  const uint32_t low = __reduce_add_sync(kAllLanes, uint32_t(value) & 0xffff);
  return (static_cast<long long>(__reduce_add_sync(kAllLanes, uint32_t(value >> 16))) << 16) + low;
}
__device__ __forceinline__ long long warp_scan(long long value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const long long left = __shfl_up_sync(kAllLanes, value, step);
    if (int(threadIdx.x & 31) >= step) value += left;
  }
  return value;
}

// Counts the tokens of a row, asks `begin_of(tokens)` for the position that is wanted, and returns the first slot of
// the chunk that holds it; `at` is that position from the chunk's first token. A batch is the chunks of eight loads:
// four are counted at a time, the totals of the first 32 are kept, and the one that holds the position is read again.
template <class BeginOf>
__device__ __forceinline__ int find_first_chunk(const DecodeParams& p, const char* selection, const RowLimits& limits,
                                                const BeginOf& begin_of, long long& at) {
  const int lane = threadIdx.x & 31, chunk_of_load = dev::keep<true>(two_loads(p) ? 1 : 0);  // a shift
  const uint32_t slots = limits.slots, batch_slots = (8 >> chunk_of_load) * p.chunk_slots;
  long long tokens = 0, in_batch = 0;
#pragma unroll 1
  for (uint32_t first = 0, batch = 0; first < slots; first += 4 * batch_slots, batch += 4) {
    uint64_t sums[4] = {};
    lengths_of<32>(p, selection, limits, first, [&](int i, int length) { sums[i / 8] += uint32_t(length); });
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const long long total = warp_sum(sums[b]);
      tokens += total;
      if (lane == int(batch) + b) in_batch = total;
    }
  }
  at = begin_of(tokens);
  if (at == 0) return 0;

  const long long end = warp_scan(in_batch);
  const int batch = __popc(__ballot_sync(kAllLanes, end <= at));  // of lanes without a batch `end` is that of the last
  at -= __shfl_sync(kAllLanes, batch == 0 ? 0 : end, max(batch - 1, 0));
  uint32_t first = batch * batch_slots;
#pragma unroll 1
  for (;; first += batch_slots) {
    uint32_t in_chunk = 0;
    lengths_of<8>(p, selection, limits, first, [&](int i, int length) {
      const uint32_t total = __reduce_add_sync(kAllLanes, uint32_t(length));
      if (lane == i >> chunk_of_load) in_chunk = total;
    });
    const long long chunk_end = warp_scan(in_chunk);
    const int chunk = __popc(__ballot_sync(kAllLanes, chunk_end <= at));
    if (chunk < 32 || slots - first <= batch_slots) {
      const int last = min(chunk, (8 >> chunk_of_load) - 1);
      at -= __shfl_sync(kAllLanes, chunk_end - in_chunk, last);
      return int(first) + last * p.chunk_slots;
    }
    at -= __shfl_sync(kAllLanes, chunk_end, 31);
  }
}

}  // namespace nsa_sel

// mapper.cuh - the warp that runs ahead: it turns the selection of the next items into row maps and fetches their Q.
#pragma once
#include "row_map.cuh"

namespace nsa_sel::mapper {

// The tokens [from, to) of a row that an item takes. Splits divide the row's actual L, so a wrong bound costs time
// only.
struct TokenRange {
  long long from, to;
};
__device__ __forceinline__ TokenRange tokens_of_item(const DecodeParams& p, const WorkItem& item, long long L) {
  if (item.split < 0) return {0, L};
  long long step = (L + p.num_splits - 1) / p.num_splits;
  step = max(step, static_cast<long long>(p.min_split_tokens));
  step = (step + 15) / 16 * 16;  // whole MMA tiles, so that only the last split has a ragged one
  const long long from = min(step * item.split, L);
  return {from, min(from + step, L)};
}

// Q of the item into shared memory, once the consumers have finished with the previous item's.
template <class Traits>
__device__ __forceinline__ void load_q(const DecodeParams& p, const SharedViews<Traits>& smem, const RowIndex& r,
                                       uint32_t phase) {
  using T = typename Traits::T;
  const int lane = threadIdx.x & 31;
  const T* q = static_cast<const T*>(p.q) + r.b * p.q_stride_b + r.s * p.q_stride_s + r.g * p.q_stride_g;
  unsigned char* dst = reinterpret_cast<unsigned char*>(smem.q);
  dev::mbarrier_wait(smem.q_empty, phase ^ 1);
  const int heads = 8 * units_of(p.h);  // rows beyond h are zero-filled: the MMAs read whole units
  for (int row = lane >> 3; row < heads; row += 4) {
    const T* src = q + row * p.q_stride_h;
#pragma unroll
    for (int chunk = 0; chunk < Traits::kDk / 8; chunk += 8) {
      const int c = chunk + (lane & 7);
      dev::cp_async_16(dst + slab_offset(heads, row, c), src + c * 8, row < p.h);
    }
  }
  dev::cp_async_arrive(smem.q_full);
}

// Fills positions [from, from + tokens) of the row into a map slot; walks on to later chunks of spans where needed.
template <class Traits>
__device__ __forceinline__ void fill_map(const DecodeParams& p, const RowIndex& r, const RowLimits& limits,
                                         SpanChunk& chunk, long long from, int tokens, uint32_t* map_k,
                                         uint32_t* map_v) {
  const int lane = threadIdx.x & 31;
  for (int filled = 0; filled < tokens;) {
    while (chunk.total <= from + filled) {
      if (chunk.next >=
          limits.slots) {  // somebody shortens the ranges while they are read: what is gone is not selected
        for (int at = filled + lane; at < tokens; at += 32) {
          dev::store(map_k + at, uint32_t{kNoRow});
          dev::store(map_v + at, uint32_t{kNoRow});
        }
        return;
      }
      const int first = chunk.next;
      chunk.scan(p, load_raw_span(p, r, first + lane, limits.slots), limits, first, chunk.total);
    }
    const int stop = int(min(static_cast<long long>(tokens), chunk.total - from));
    for (int at = filled; at < stop; at += 32) {
      const int mine = min(at + lane, stop - 1);  // all lanes take part in the search
      const int token = chunk.token_at(from, mine);
      if (at + lane < stop) {
        const RowOffsets offsets = resolve_token(p, limits.table, token);
        dev::store(map_k + mine, offsets.k);
        dev::store(map_v + mine, offsets.v);
      }
    }
    filled = stop;
  }
}

template <class Traits>
__device__ __forceinline__ void publish(const SharedViews<Traits>& smem, RingCursor& slot,
                                        const SegmentHeader& header) {
  if ((threadIdx.x & 31) == 0) {
    dev::store(&smem.segments[slot.slot].source, header.source);
    dev::store(&smem.segments[slot.slot].info, header.info);
  }
  __syncwarp();  // the arrival below releases the map entries of all lanes
  if ((threadIdx.x & 31) == 0) dev::mbarrier_arrive(smem.map_full + slot.slot);
  slot.advance(kMapSlots);
}

template <class Traits>
__device__ __forceinline__ void run(const DecodeParams& p, const SharedViews<Traits>& smem) {
  using T = typename Traits::T;
  const int lane = threadIdx.x & 31;
  RingCursor slot;
  uint32_t q_phase = 0;

  int item = int(blockIdx.x);
  RowIndex row = row_index(item < p.num_items ? work_item(p, item).row : 0, p.S, p.G);
  // The first 32 spans are asked for beside their count, not behind it: what lies beyond is read and dropped.
  RawSpan raw = item < p.num_items ? load_raw_span(p, row, lane, p.n) : RawSpan{-1, 0};
  RowLimits limits = item < p.num_items ? row_limits(p, row) : RowLimits{};
  while (item < p.num_items) {
    const WorkItem work = work_item(p, item);
    SpanChunk chunk;
    chunk.scan(p, raw, limits, 0, 0);
    long long L = chunk.total;
    for (int first = 32; first < limits.slots;
         first += 32) {  // long selections: count first, so that the last segment is known
      SpanChunk more;
      more.scan(p, load_raw_span(p, row, first + lane, limits.slots), limits, first, L);
      L = more.total;
    }

    // The next item's spans travel while this one's map is built.
    const int next_item = item + int(gridDim.x);
    RowIndex next_row = row;
    RawSpan next_raw{-1, 0};
    RowLimits next_limits{};
    if (next_item < p.num_items) {
      next_row = row_index(work_item(p, next_item).row, p.S, p.G);
      next_raw = load_raw_span(p, next_row, lane, p.n);
      next_limits = row_limits(p, next_row);
    }

    const TokenRange range = tokens_of_item(p, work, L);
    const int64_t k_row = (p.page_size > 0 ? 0 : row.b * p.k_stride_b) + row.g * p.k_stride_g;
    const int64_t v_row = (p.page_size > 0 ? 0 : row.b * p.v_stride_b) + row.g * p.v_stride_g;
    SegmentHeader header;
    header.source.k_base = reinterpret_cast<uint64_t>(static_cast<const T*>(p.k) + k_row);
    header.source.v_base = reinterpret_cast<uint64_t>(static_cast<const T*>(p.v) + v_row);
    header.info.row = work.row;
    header.info.split = work.split;
    long long from = range.from;
    do {  // an item with nothing selected is one empty segment: somebody has to write its zeros
      const int tokens = int(min(range.to - from, static_cast<long long>(Traits::kSegment)));
      header.info.tokens = tokens;
      header.info.flags = (from == range.from ? kFirstSegment : 0) | (from + tokens == range.to ? kLastSegment : 0);
      dev::mbarrier_wait(smem.map_empty + slot.slot, slot.phase ^ 1);
      fill_map<Traits>(p, row, limits, chunk, from, tokens, smem.map_k(slot.slot), smem.map_v(slot.slot));
      publish(smem, slot, header);
      if (from == range.from && tokens > 0) {  // behind the map: K may already fly while Q waits for its place
        load_q(p, smem, row, q_phase);
        q_phase ^= 1;
      }
      from += tokens;
    } while (from < range.to);

    item = next_item;
    row = next_row;
    raw = next_raw;
    limits = next_limits;
  }

  SegmentHeader stop{};
  stop.info.tokens = -1;
  dev::mbarrier_wait(smem.map_empty + slot.slot, slot.phase ^ 1);
  publish(smem, slot, stop);
  dev::cp_async_wait_all();  // a thread must not exit with copies in flight
}

}  // namespace nsa_sel::mapper

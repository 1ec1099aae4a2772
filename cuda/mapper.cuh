// mapper.cuh - the warp that runs ahead: it turns the selection of the next items into row maps and fetches their Q.
#pragma once
#include "row_map.cuh"

namespace nsa_sel::mapper {

// The tokens [from, to) of a row that an item takes. Splits divide the row's actual L, so a wrong bound costs time
// only.
struct TokenRange {
  long long from, to;
};
__device__ __forceinline__ TokenRange tokens_of_item(const DecodeParams& p, int split, long long L) {
  if (split < 0) return {0, L};
  // At least L / splits; rounded up a little more where L does not fit 31 bits.
  const int shift = L >> 31 != 0 ? 32 : 0;
  long long step = static_cast<long long>(divide(int(L >> shift), p.by_splits) + 1) << shift;
  if (shift == 0 && (step - 1) * p.num_splits == L) --step;
  step = max(step, static_cast<long long>(p.min_split_tokens));
  step = (step + 15) & ~15ll;  // whole MMA tiles, so that only the last split has a ragged one
  const long long from = min(step * split, L);
  return {from, min(from + step, L)};
}

// Asks for Q of a row; `cp_async_arrive` on q_full says that it has landed.
template <class Traits>
__device__ __forceinline__ void copy_q(const DecodeParams& p, const SharedViews<Traits>& smem, const RowIndex& r) {
  using T = typename Traits::T;
  const int lane = dev::keep(int(threadIdx.x) & 31);  // kept: nothing of this is worth a register between two items
  const T* q = static_cast<const T*>(p.q) + uint32_t(r.b) * p.q_stride_b + uint32_t(r.s) * p.q_stride_s +
               uint32_t(r.g) * p.q_stride_g + (lane & 7) * 8;
  unsigned char* dst = reinterpret_cast<unsigned char*>(smem.q);
  const int heads = 8 * units_of(p.h);  // rows beyond h are zero-filled: the MMAs read whole units
#pragma unroll 1
  for (int row = lane >> 3; row < heads; row += 8) {
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      const T* src = q + uint32_t(row + half) * p.q_stride_h;
#pragma unroll
      for (int slab = 0; slab < Traits::kDk / 64; ++slab) {
        dev::cp_async_16(dst + q_chunk_offset<Traits>(row + half, slab * 8 + (lane & 7)), src + slab * 64,
                         row + half < p.h);
      }
    }
  }
}

// The factors of a float8 cache's K or V, of the row that is being mapped.
struct MappedScale {
  const float* base;  // a factor a token: that of this (b, g)'s token 0, or of this g's pool
  float of_row;
};
__device__ __forceinline__ MappedScale load_scale(const ScaleParams& scale, const RowIndex& r) {
  const float* base = scale.values + uint32_t(r.b) * scale.stride_b + uint32_t(r.g) * scale.stride_g;
  return {base, scale.values == nullptr || scale.per_token ? 1.0f : dev::load(base)};
}
// Asks for the factors of tokens at `rows`, one each; zero where there is no row, because 0 * NaN would reach the sum.
template <int kWindows>
__device__ __forceinline__ void copy_scales(float* to, const ScaleParams& scale, const float* base,
                                            const RowOffsets (&rows)[kWindows], int count) {
  const int lane = int(threadIdx.x) & 31;
#pragma unroll
  for (int w = 0; w < kWindows; ++w) {
    if (w * 32 + lane >= count) continue;
    const auto at = uint64_t(rows[w].page) * scale.bytes_page + uint64_t(rows[w].in_page) * scale.bytes_token;
    dev::cp_async_4(to + w * 32 + lane, reinterpret_cast<const unsigned char*>(base) + at, rows[w].k != kNoRow);
  }
}

template <class Traits>
struct Mapper {
  using T = typename Traits::T;
  static constexpr int kTile = Traits::kRowsK;

  const DecodeParams& p;
  const SharedViews<Traits> smem;
  const int lane;
  RingCursor slot;
  uint32_t q_phase = 0;
  int item = 0;
  // The row that is being mapped.
  RowIndex row{};
  SegmentHeader header{};
  RowLimits limits{};
  TokenRange range{};
  SpanChunk chunk{};
  MappedScale k_scale{}, v_scale{};  // float8
  RawSlot behind{};                  // of the next chunk, already in the air
  int at = 0;                        // next position, from the chunk's first token
  int filled = 0;                    // entries of the segment's map
  int published = 0;                 // tiles of it that the loader may take

  __device__ __forceinline__ Mapper(const DecodeParams& params, const SharedViews<Traits>& views)
      : p(params), smem(views), lane(int(threadIdx.x) & 31) {}

  // Asks for everything that the map of an item depends on.
  __device__ __forceinline__ RawRow ask(int of_item) {
    item = of_item;
    const WorkItem work = work_item(p, item);
    row = row_index(p, work.row);
    const RawRow raw = load_row(p, row);
    const bool paged = p.page_size > 0;
    const int64_t k_row = (paged ? 0 : uint32_t(row.b) * p.k_stride_b) + uint32_t(row.g) * p.k_stride_g;
    const int64_t v_row = (paged ? 0 : uint32_t(row.b) * p.v_stride_b) + uint32_t(row.g) * p.v_stride_g;
    header.source.k_base = reinterpret_cast<uint64_t>(p.k) + k_row * Traits::kCacheBytes;
    header.source.v_base = reinterpret_cast<uint64_t>(p.v) + v_row * Traits::kCacheBytes;
    if constexpr (Traits::kFloat8) k_scale = load_scale(p.k_scale, row), v_scale = load_scale(p.v_scale, row);
    header.info.row = work.row;
    header.info.split = work.split;
    return raw;
  }

  // Finds the item's first position.
  __device__ __forceinline__ void look(const RawRow& raw) {
    limits = row_limits(p, raw, row.s);
    chunk.scan(p, raw.slot, limits, 0);
    range = tokens_of_item(p, header.info.split, chunk.total);
    at = int(range.from);
    if (limits.slots <= p.chunk_slots) return;
    const char* selection = selection_of(p, row);
    long long skip = 0;
    const int first = find_first_chunk(
        p, selection, limits,
        [&](long long tokens) {
          range = tokens_of_item(p, header.info.split, tokens);
          return range.to > range.from ? range.from : 0;
        },
        skip);
    if (first > 0) chunk.scan(p, load_slot<4>(p, selection, uint32_t(first + lane), limits.slots), limits, first);
    at = int(skip);
    ask_behind();
    next_chunk();
  }

  __device__ __forceinline__ void ask_behind() {
    if (chunk.next < limits.slots) {
      behind = load_slot<4>(p, selection_of(p, row), uint32_t(chunk.next + lane), limits.slots);
    }
  }

  __device__ __forceinline__ void begin_segment(long long from) {
    const int tokens = int(min(range.to - from, static_cast<long long>(Traits::kSegment)));
    header.info.tokens = tokens;
    header.info.flags = (from == range.from ? kFirstSegment : 0) | (from + tokens == range.to ? kLastSegment : 0);
    write_header();
    filled = published = 0;
  }
  __device__ __forceinline__ void write_header() {
    if (lane != 0) return;
    dev::store(&smem.segments[slot.slot].source, header.source);
    dev::store(&smem.segments[slot.slot].info, header.info);
    if constexpr (Traits::kFloat8) {
      dev::store(smem.row_scales + slot.slot, RowScales{p.scale_log2 * k_scale.of_row, p.out_scale * v_scale.of_row});
    }
  }

  // Map entries [first, first + count) of the slot from the positions of this chunk; count <= 32 * kWindows.
  template <int kWindows>
  __device__ __forceinline__ void fill(uint32_t* map_k, int first, int count) {
    uint32_t tokens[kWindows];
    RowOffsets rows[kWindows];
    chunk.tokens_at(uint32_t(at), tokens);
    resolve_tokens(p, limits.table, tokens, count, rows);
    uint32_t* to = map_k + first + lane;
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      if (w * 32 + lane >= count) continue;
      dev::store(to + w * 32, rows[w].k);
      dev::store(to + Traits::kSegment + w * 32, rows[w].v);
    }
    copy_all_scales(first, rows, count);
  }
  template <int kWindows>
  __device__ __forceinline__ void copy_all_scales(int first, const RowOffsets (&rows)[kWindows], int count) {
    if constexpr (Traits::kFloat8) {
      if (p.k_scale.per_token) copy_scales(smem.scales_k(slot.slot) + first, p.k_scale, k_scale.base, rows, count);
      if (p.v_scale.per_token) copy_scales(smem.scales_v(slot.slot) + first, p.v_scale, v_scale.base, rows, count);
    }
  }
  __device__ __forceinline__ void fill_missing(uint32_t* map_k, int first, int count) {
    const RowOffsets nowhere[1] = {{kNoRow, kNoRow, 0, 0}};
    copy_all_scales(first, nowhere, count);
    if (lane >= count) return;
    dev::store(map_k + first + lane, uint32_t{kNoRow});
    dev::store(map_k + Traits::kSegment + first + lane, uint32_t{kNoRow});
  }

  // Says that the tiles up to `ready` of the slot's map are written.
  __device__ __forceinline__ void publish(int ready) {
    __syncwarp();  // the arrivals below release the map entries of all lanes
    if (lane == 0) {
#pragma unroll 1
      for (int t = published; t < ready; ++t) dev::mbarrier_arrive(smem.map_full + slot.slot * Traits::kTilesK + t);
    }
    published = ready;
  }
  __device__ __forceinline__ void publish_whole_tiles() {
    const int ready = int(uint32_t(filled) / kTile);
    if (filled < header.info.tokens && ready > published) publish(ready);
  }

  // The rest of a segment's map, handed over tile by tile: the loader starts on the first while the others are built.
  __device__ __forceinline__ void map_segment() {
    uint32_t* map_k = smem.map_k(slot.slot);
    const int tokens = header.info.tokens;
    while (filled < tokens) {
      int count = min(tokens - filled, chunk.total - at);
      if (count <= 0) {  // somebody shortens the selection while it is read: what is gone is not selected
        count = min(tokens - filled, 32);
        fill_missing(map_k, filled, count);
      } else if (filled == 0 || count <= 64) {  // the loader waits for the first tile
        count = min(count, 64);
        fill<2>(map_k, filled, count);
      } else {
        count = min(count, 128);
        fill<4>(map_k, filled, count);
      }
      filled += count;
      at += count;
      publish_whole_tiles();
      if (at >= chunk.total) next_chunk();
    }
    fill_missing(map_k, filled, -filled & 15);  // to whole MMA tiles, by rows that do not exist
    publish(Traits::kTilesK);  // tiles without tokens as well, so that all barriers of a slot keep one phase
    if constexpr (Traits::kFloat8) {
      if (p.k_scale.per_token || p.v_scale.per_token) dev::cp_async_arrive(smem.scales_full + slot.slot);
    }
    slot.advance(kMapSlots);
  }
  __device__ __forceinline__ void wait_for_slot() {
    if (slot.lapped) dev::mbarrier_wait(smem.map_empty + slot.slot, slot.phase ^ 1);
  }
  __device__ __forceinline__ void next_chunk() {
    while (at >= chunk.total && chunk.next < limits.slots) {
      at -= chunk.total;
      const RawSlot raw = behind;
      chunk.scan(p, raw, limits, chunk.next);
      ask_behind();
    }
  }

  // Before the block's first barrier, while another warp makes the barriers: Q flies with the first item's selection.
  __device__ __forceinline__ RawRow begin() {
    const RawRow raw = ask(int(blockIdx.x));
    copy_q<Traits>(p, smem, row);
    return raw;
  }

  __device__ __forceinline__ void run(RawRow raw) {
    bool q_in_air = true, more = true;
#pragma unroll 1
    do {
      look(raw);
      long long from = range.from;
      bool first = true;
#pragma unroll 1
      do {  // an item with nothing selected is one empty segment
        wait_for_slot();
        begin_segment(from);
        map_segment();
        from += header.info.tokens;
        const RowIndex r = row;
        const bool wanted = header.info.tokens > 0;
        if (from >= range.to) {
          more = item + int(gridDim.x) < p.num_items;
          if (more) raw = ask(item + int(gridDim.x));  // travels while Q waits for its place
        }
        if (first) fetch_q(r, wanted, q_in_air);
        first = q_in_air = false;
      } while (from < range.to);
    } while (more);
    wait_for_slot();
    header.info.tokens = -1;  // no more work
    write_header();
    filled = published = 0;
    publish(Traits::kTilesK);
    dev::cp_async_wait_all();  // a thread must not exit with copies in flight
  }

  // Q of an item, behind its first map: K may already fly while Q waits for its place.
  __device__ __forceinline__ void fetch_q(const RowIndex& r, bool wanted, bool in_air) {
    if (!wanted) {
      if (in_air) dev::cp_async_wait_all();  // the next Q takes the same place
      return;
    }
    if (!in_air) {
      dev::mbarrier_wait(smem.q_empty, q_phase ^ 1);
      copy_q<Traits>(p, smem, r);
    }
    dev::cp_async_arrive(smem.q_full);
    q_phase ^= 1;
  }
};

}  // namespace nsa_sel::mapper

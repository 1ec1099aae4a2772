// traits.cuh - what a kernel instance knows at compile time, and its views of shared memory.
#pragma once
#include "../cpp/params.h"
#include "../cpp/tile_shape.h"
#include "primitives.cuh"

namespace nsa_sel {

template <class T_, int kDk_, int kDv_, int kHeadTile, Loads kLoads = Loads::kCpAsync>
struct DecodeTraits {
  using T = T_;
  static constexpr TileShape kTile = tile_shape(kDk_, kDv_, kHeadTile, kLoads);
  static constexpr bool kBulk = kLoads == Loads::kBulk;
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kTokenWarps = kTile.token_warps;
  static constexpr int kUnits = kTile.units;  // units of 8 heads held by a warp
  static constexpr int kRowsK = kTile.rows_k, kRowsV = kTile.rows_v;
  static constexpr int kSegment = kTile.segment;
  static constexpr int kTilesK = kSegment / kRowsK, kTilesV = kSegment / kRowsV;
  static constexpr int kSubTiles = kRowsK / (16 * kTokenWarps);  // m16 tiles of a warp in one K tile
  static constexpr int kColumnTiles = kDv / (16 * kTokenWarps);  // m16 tiles of V's columns of a warp
  static constexpr int kThreads = kDecodeThreads;
  static constexpr int kBlocksPerSm = kTile.blocks_per_sm;
  // Q in registers where they allow it (48 of them at 192 columns and 16 heads); else a warp rereads it for every K
  // tile.
  static constexpr bool kQInRegisters = kHeadTile == 16;
  // A chain of kDk/16 dependent MMAs is about 400 clocks; two accumulator sets halve it where registers allow.
  static constexpr int kAccumulatorSets = kUnits <= 2 ? 2 : 1;
  static_assert(kDk % 64 == 0 && kDv % 64 == 0, "rows are cut into 128-byte slabs");
  static_assert(kRowsK % (16 * kTokenWarps) == 0 && kRowsV % 16 == 0, "tiles are whole MMA tiles");
  static_assert(kSegment % kRowsK == 0 && kSegment % kRowsV == 0, "a segment is whole tiles of K and of V");
  static_assert(smem_layout(kTile, kHeadTile, 2).total <= 99 * 1024, "two slots fit the smallest SM (sm_86, sm_89)");
};

// Written per segment by the mapper; loaders read both halves, consumers the second. Two 16-byte accesses.
struct alignas(16) SegmentSource {
  uint64_t k_base, v_base;  // addresses of this (b, g)'s token 0, or of this g's pool
};
struct alignas(16) SegmentInfo {
  int32_t tokens;  // selected tokens in the segment; -1: no more work
  int32_t row;
  int32_t split;  // -1: the row is not split
  int32_t flags;  // kFirstSegment | kLastSegment of the item
};
struct SegmentHeader {
  SegmentSource source;
  SegmentInfo info;
};
static_assert(sizeof(SegmentHeader) == kSegmentHeaderBytes);
constexpr int kFirstSegment = 1, kLastSegment = 2;

constexpr uint32_t kNoRow = 0xffffffffu;  // map entry of a token whose page id is outside the pool

// The shared memory of one block, by name.
template <class Traits>
struct SharedViews {
  using T = typename Traits::T;
  unsigned char* slots;
  T* q;
  T* p;
  float* row_max;
  float* row_sum;
  uint32_t* map;
  SegmentHeader* segments;
  uint64_t *slot_full, *slot_empty, *map_full, *map_empty, *q_full, *q_empty;

  template <class Base>
  __device__ __forceinline__ SharedViews(Base base, const DecodeParams& params) {
    const SmemLayout& at = params.smem;
    const int heads = 8 * units_of(params.h);
    slots = dev::smem_at<unsigned char>(base, at.slots, size_t(at.num_slots) * Traits::kTile.slot_bytes, "slots");
    q = dev::smem_at<T>(base, at.q, size_t(heads) * Traits::kDk, "q");
    p = dev::smem_at<T>(base, at.p, size_t(heads) * Traits::kSegment, "p");
    row_max = dev::smem_at<float>(base, at.row_max, size_t(Traits::kTokenWarps) * heads, "row_max");
    row_sum = dev::smem_at<float>(base, at.row_sum, size_t(Traits::kTokenWarps) * heads, "row_sum");
    map = dev::smem_at<uint32_t>(base, at.map, size_t(kMapSlots) * 2 * Traits::kSegment, "map");
    segments = dev::smem_at<SegmentHeader>(base, at.segments, kMapSlots, "segments");
    uint64_t* barriers = dev::smem_at<uint64_t>(base, at.barriers, num_barriers(at.num_slots), "barriers");
    slot_full = barriers;
    slot_empty = slot_full + at.num_slots;
    map_full = slot_empty + at.num_slots;
    map_empty = map_full + kMapSlots;
    q_full = map_empty + kMapSlots;
    q_empty = q_full + 1;
  }

  __device__ __forceinline__ uint32_t* map_k(int slot) const { return map + slot * 2 * Traits::kSegment; }
  __device__ __forceinline__ uint32_t* map_v(int slot) const { return map_k(slot) + Traits::kSegment; }
};

// A split's partial in the shared memory of its block, over the ring, which nobody uses any more by then.
template <class Traits>
struct ClusterPartial {
  static constexpr int kHeadStride = cluster_head_stride(Traits::kDv);
  float* o;   // [h][kHeadStride]
  float* ml;  // [h][2]
  __device__ __forceinline__ ClusterPartial(const SharedViews<Traits>& smem, int h)
      : o(reinterpret_cast<float*>(smem.slots)), ml(o + h * kHeadStride) {}
};

// Where the 16-byte chunk `chunk` of row `row` lives in a tile stored as 128-byte slabs [D / 64][rows][128 B]: the XOR
// spreads a column of chunks over all banks, so that eight rows of one chunk (ldmatrix) never collide.
__device__ __forceinline__ int slab_offset(int rows, int row, int chunk) {
  return (chunk >> 3) * rows * 128 + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// Where a chunk of a K or V tile lives: swizzled slabs, or whole padded rows as a bulk copy leaves them.
template <class Traits, int D, int kRows>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  if constexpr (Traits::kBulk) {
    return row * (D * 2 + Traits::kTile.row_padding) + chunk * 16;
  } else {
    return slab_offset(kRows, row, chunk);
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// A position in a ring of n slots and the phase parity of its barriers.
struct RingCursor {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int n) {
    if (++slot == n) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// Which item is which (row, split); the plan's rule.
struct WorkItem {
  int row, split;  // split -1: whole row
};
__device__ __forceinline__ WorkItem work_item(const DecodeParams& params, int item) {
  if (item < params.full_rows) return {item, -1};
  const int rest = item - params.full_rows;
  return {params.full_rows + rest / params.num_splits, rest % params.num_splits};
}

// Row r = (b * G + g) * S + s: the queries of one request and group are neighbours, so shared spans meet in L2.
struct RowIndex {
  int b, s, g;
};
__device__ __forceinline__ RowIndex row_index(int row, int S, int G) {
  const int bg = row / S;
  return {bg / G, row - bg * S, bg % G};
}

}  // namespace nsa_sel

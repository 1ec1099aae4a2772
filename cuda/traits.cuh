// traits.cuh - what a kernel instance knows at compile time, and its views of shared memory.
#pragma once
#include "../cpp/params.h"
#include "../cpp/tile_shape.h"
#include "primitives.cuh"

namespace nsa_sel {

// Rows of a tile are cut into slabs: of 128 bytes where whole ones make up a row, else of 64.
constexpr int slab_bytes(int row_bytes) { return row_bytes % 128 == 0 ? 128 : 64; }

template <class T_, int kDk_, int kDv_, int kHeadTile_, Loads kLoads = Loads::kCpAsync, Cache kCache = Cache::kSame>
struct DecodeTraits {
  using T = T_;
  static constexpr TileShape kTile = tile_shape(kDk_, kDv_, kHeadTile_, kLoads, kCache);
  static constexpr bool kBulk = kLoads == Loads::kBulk;
  static constexpr bool kFloat8 = kCache == Cache::kFloat8E4m3;
  static constexpr int kCacheBytes = kTile.cache_bytes;
  static constexpr int kDk = kDk_, kDv = kDv_, kHeadTile = kHeadTile_;
  static constexpr SmemLayout kSmem = smem_layout(kTile, 0);  // offsets; the ring's length is the planner's choice
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
  static constexpr bool kQInRegisters = kHeadTile_ == 16;
  // Whether consumers hold the fragments of two steps. Elsewhere the second set would not fit beside logits and O.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr bool kFragmentsAhead = false;
#else
  static constexpr bool kFragmentsAhead = kHeadTile_ == 16;
#endif
  // Whether consumers keep their offsets in registers: two blocks an SM have none to spare below sm_90.
  static constexpr bool kKeepOffsets = dev::kKeepByDefault || kBlocksPerSm == 1;
  // A chain of kDk/16 dependent MMAs is about 400 clocks; two accumulator sets halve it where registers allow.
  static constexpr int kAccumulatorSets = kUnits <= 2 ? 2 : 1;
  static_assert(kDk % 64 == 0 && kDv % 64 == 0, "rows are cut into whole slabs");
  static_assert(kRowsK % (16 * kTokenWarps) == 0 && kRowsV % 16 == 0, "tiles are whole MMA tiles");
  static_assert(kSegment % kRowsK == 0 && kSegment % kRowsV == 0, "a segment is whole tiles of K and of V");
  static_assert(smem_layout(kTile, 2).total <= 99 * 1024, "two slots fit the smallest SM (sm_86, sm_89)");
};

// Named barriers: of the two groups of head warps, and of all consumers.
constexpr int kHeadWarpBarrier = 1, kConsumerBarrier = 3;

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
// What a row's logits and output are multiplied by, the factors of its group among them. Written per segment by the
// mapper of a float8 cache.
struct RowScales {
  float logits, out;
};
static_assert(sizeof(RowScales) == kRowScalesBytes);
constexpr int kFirstSegment = 1, kLastSegment = 2;

constexpr uint32_t kNoRow = 0xffffffffu;  // map entry of a token whose page id is outside the pool

// A position in a ring of n slots and the phase parity of its barriers.
struct RingCursor {
  int slot = 0;
  uint32_t phase = 0;
  bool lapped = false;  // whoever fills the ring need not wait for its slots before
  __device__ __forceinline__ void advance(int n) {
    if (++slot == n) {
      slot = 0;
      phase ^= 1;
      lapped = true;
    }
  }
};

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
  float* scales;                     // float8: [map slots][2][segment], of each token's K and V row
  RowScales* row_scales;             // float8: [map slots]
  uint64_t* scales_full;             // float8: [map slots]
  uint64_t *slot_full, *slot_empty;  // [num_slots]
  uint64_t* map_full;                // [map slots][tiles of K]
  uint64_t* map_empty;               // [map slots]
  uint64_t *q_full, *q_empty;

  template <class Base>
  __device__ __forceinline__ SharedViews(Base base, int num_slots) {
    constexpr SmemLayout at = Traits::kSmem;
    constexpr int kHeads = Traits::kHeadTile;
    uint64_t* barriers = dev::smem_at<uint64_t>(base, at.barriers, at.num_barriers, "barriers");
    slot_full = barriers;
    slot_empty = slot_full + Traits::kTile.max_slots;
    map_full = slot_empty + Traits::kTile.max_slots;
    map_empty = map_full + kMapSlots * Traits::kTilesK;
    q_full = map_empty + kMapSlots;
    q_empty = q_full + 1;
    scales_full = q_empty + 1;
    segments = dev::smem_at<SegmentHeader>(base, at.segments, kMapSlots, "segments");
    map = dev::smem_at<uint32_t>(base, at.map, size_t(kMapSlots) * 2 * Traits::kSegment, "map");
    if constexpr (Traits::kFloat8) {
      constexpr size_t kTokens = size_t(kMapSlots) * 2 * Traits::kSegment;
      scales = dev::smem_at<float>(base, at.scales, kTokens, "scales");
      row_scales = dev::smem_at<RowScales>(base, at.scales + kTokens * 4, kMapSlots, "row_scales");
    }
    row_max = dev::smem_at<float>(base, at.row_max, Traits::kTokenWarps * kHeads, "row_max");
    row_sum = dev::smem_at<float>(base, at.row_sum, Traits::kTokenWarps * kHeads, "row_sum");
    q = dev::smem_at<T>(base, at.q, size_t(kHeads) * Traits::kDk, "q");
    p = dev::smem_at<T>(base, at.p, size_t(kHeads) * Traits::kSegment, "p");
    slots = dev::smem_at<unsigned char>(base, at.slots, size_t(num_slots) * Traits::kTile.slot_bytes, "slots");
  }

  __device__ __forceinline__ uint32_t* map_k(int slot) const { return map + slot * 2 * Traits::kSegment; }
  __device__ __forceinline__ uint32_t* map_v(int slot) const { return map_k(slot) + Traits::kSegment; }

  __device__ __forceinline__ float* scales_k(int slot) const { return scales + slot * 2 * Traits::kSegment; }
  __device__ __forceinline__ float* scales_v(int slot) const { return scales_k(slot) + Traits::kSegment; }

  // For readers of the map other than the loader. The arrival of the loader's copies, which they wait for as well, is
  // not documented to release what the loader has seen of the mapper.
  __device__ __forceinline__ void wait_for_mapped_tile(const RingCursor& segment, int tile) const {
    dev::mbarrier_wait(map_full + segment.slot * Traits::kTilesK + tile, segment.phase);
  }
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

// Where the 16-byte chunk `chunk` of row `row` lives in a tile stored as slabs [slabs][rows][kSlab bytes]: the XOR
// spreads a column of chunks over all banks, so that eight rows of one chunk (ldmatrix) never collide. Two rows of a
// narrow slab share 128 bytes, and those are r and r + 2: the loader writes them together.
template <int kSlab = 128>
__device__ __forceinline__ int slab_offset(int rows, int row, int chunk) {
  if constexpr (kSlab == 128) {
    return (chunk >> 3) * rows * 128 + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
  } else {
    const int line = (row >> 1 & 2) | (row & 1);  // of the four of eight rows
    return (chunk >> 2) * rows * 64 + (row >> 3) * 512 + line * 128 + (row & 2) * 32 + (((chunk & 3) ^ line) << 4);
  }
}

// Where chunk `chunk` of Q's row `row` lives. With a float8 cache a thread reads eight bytes of a row and a half-warp
// 32 bytes of four rows: the XOR spreads those.
template <class Traits>
__device__ __forceinline__ int q_chunk_offset(int row, int chunk) {
  if constexpr (Traits::kFloat8) {
    return (chunk >> 3) * Traits::kHeadTile * 128 + row * 128 + (((chunk & 7) ^ (row & 3) << 1) << 4);
  } else {
    return slab_offset(Traits::kHeadTile, row, chunk);
  }
}

// Where a chunk of a K or V tile lives: swizzled slabs, or whole padded rows as a bulk copy leaves them.
template <class Traits, int D, int kRows>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  if constexpr (Traits::kBulk) {
    return row * (D * 2 + Traits::kTile.row_padding) + chunk * 16;
  } else {
    return slab_offset<slab_bytes(D * Traits::kCacheBytes)>(kRows, row, chunk);
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

__device__ __forceinline__ int divide(int x, const Divisor& by) {
  return int(__umulhi(uint32_t(x) << 1, by.multiplier) >> by.shift);
}

// Which item is which (row, split); the plan's rule.
struct WorkItem {
  int row, split;  // split -1: whole row
};
__device__ __forceinline__ WorkItem work_item(const DecodeParams& params, int item) {
  if (item < params.full_rows) return {item, -1};
  const int rest = item - params.full_rows;
  const int row = divide(rest, params.by_splits);
  return {params.full_rows + row, rest - row * params.num_splits};
}

// Row r = (b * G + g) * S + s: the queries of one request and group are neighbours, so shared spans meet in L2.
struct RowIndex {
  int b, s, g;
};
template <class Params>
__device__ __forceinline__ RowIndex row_index(const Params& p, int row) {
  const int bg = divide(row, p.by_S), b = divide(bg, p.by_G);
  return {b, row - bg * p.S, bg - b * p.G};
}

}  // namespace nsa_sel

// loader.cuh - the warps that keep the ring full: K tiles of a segment, then its V tiles, then the next segment's K.
#pragma once
#include "traits.cuh"

namespace nsa_sel::loader {

// One tile of up to kRows rows of D elements into a slot. Rows that do not exist become zeros up to whole MMA tiles:
// stale bits there could be NaN, and 0 * NaN would reach the sum.
struct Tile {
  unsigned char* slot;
  const unsigned char* base;
  const uint32_t* map;  // of the tile's first row; kNoRow behind the segment's last token
  int rows;             // a multiple of 16: the mapper fills the map up to there
  uint32_t unit;        // bytes of one step of an offset
};

// cp.async: four rows and one 128-byte slab an instruction (eight and 64), so that a row's slab is one full line of
// global memory. What counts here is instructions a row, because one warp feeds the ring: of a group of eight (16) rows
// the lanes of a row take two neighbours, which are one read of the map, one swizzle pattern each, and everything else
// immediate offsets.
template <class Traits, int D, int kRows>
struct ThreadCopies {
  static constexpr int kSlabBytes = slab_bytes(D * Traits::kCacheBytes), kSlabs = D * Traits::kCacheBytes / kSlabBytes;
  static constexpr int kLanes = kSlabBytes / 16, kGroupRows = 2 * 32 / kLanes;
  static constexpr int kGroups = kRows / kGroupRows / kLoaderWarps, kStep = 16 / kGroupRows;
  static_assert(kGroups * kGroupRows * kLoaderWarps == kRows && kGroups % kStep == 0,
                "loader warps share a tile's rows evenly");

  unsigned char* dst[2];  // in the slot, of the lane's two rows of the first group
  const unsigned char* src;
  const uint2* map;  // of the lane's two rows of the first group
  uint32_t unit;

  __device__ __forceinline__ ThreadCopies(const Tile& tile, int loader_warp) : unit(tile.unit) {
    const int lane = threadIdx.x & 31, chunk = lane % kLanes;
    const int row = lane / kLanes * 2 + loader_warp * kGroups * kGroupRows;
    for (int e = 0; e < 2; ++e) dst[e] = tile.slot + slab_offset<kSlabBytes>(kRows, row + e, chunk);
    src = dev::keep(tile.base + chunk * 16);  // one multiply-add a row from here
    map = reinterpret_cast<const uint2*>(tile.map + row);
  }

  template <int kGroup, int kSlab = 0>
  __device__ __forceinline__ void copy_row(unsigned char* to, const unsigned char* from, bool present) const {
    dev::cp_async_16_at<kGroup * 1024 + kSlab * kRows * kSlabBytes, kSlab * kSlabBytes>(to, from, present);
    if constexpr (kSlab + 1 < kSlabs) copy_row<kGroup, kSlab + 1>(to, from, present);
  }
  __device__ __forceinline__ const unsigned char* address(uint32_t offset) const {
    return src + uint64_t(offset) * unit;
  }

  // Groups [kFirst, kLast) whose offsets are in registers.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void copy(const uint2* offsets) const {
    const uint2 offset = offsets[kFirst];
    copy_row<kFirst>(dst[0], address(offset.x), offset.x != kNoRow);
    copy_row<kFirst>(dst[1], address(offset.y), offset.y != kNoRow);
    if constexpr (kFirst + 1 < kLast) copy<kFirst + 1, kLast>(offsets);
  }

  // All reads of the map come first: behind a copy, each would cost its latency again.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void copy() const {
    uint2 offsets[kGroups];
#pragma unroll
    for (int i = kFirst; i < kLast; ++i) offsets[i] = dev::load(map + i * (kGroupRows / 2));
    copy<kFirst, kLast>(offsets);
  }
  template <int kFirst>
  __device__ __forceinline__ void copy_up_to(int groups) const {
    if (kFirst >= groups) return;
    copy<kFirst, kFirst + kStep>();
    if constexpr (kFirst + kStep < kGroups) copy_up_to<kFirst + kStep>(groups);
  }
};

template <class Traits, int D, int kRows>
__device__ __forceinline__ void copy_by_threads(const Tile& tile, uint64_t* full, int loader_warp) {
  using Copies = ThreadCopies<Traits, D, kRows>;
  const Copies copies(tile, loader_warp);
  if (tile.rows == kRows) {
    copies.template copy<0, Copies::kGroups>();
  } else {
    copies.template copy_up_to<0>(tile.rows / Copies::kGroupRows - loader_warp * Copies::kGroups);
  }
  dev::cp_async_arrive(full);
}

// Bulk copies: a lane moves a whole row with one instruction.
template <class Traits, int D, int kRows>
__device__ __forceinline__ void copy_by_engine(const Tile& tile, uint64_t* full) {
  constexpr int kRounds = (kRows + 31) / 32;
  const int lane = threadIdx.x & 31;
  uint32_t offsets[kRounds];
  int present = 0;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = i * 32 + lane;
    offsets[i] = row < tile.rows ? dev::load(tile.map + row) : kNoRow;
    present += __popc(__ballot_sync(0xffffffffu, offsets[i] != kNoRow));
    if (row < tile.rows && offsets[i] == kNoRow) {
      for (int chunk = 0; chunk < D / 8; ++chunk) {
        dev::store(reinterpret_cast<uint4*>(tile.slot + tile_offset<Traits, D, kRows>(row, chunk)), uint4{0, 0, 0, 0});
      }
      dev::fence_proxy_async();  // a later tile's bulk copy into these rows must not pass the zeros
    }
  }
  __syncwarp();  // the arrival releases every lane's zeros
  if (lane == 0) dev::mbarrier_arrive_expect_tx(full, uint32_t(present) * D * 2);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    if (offsets[i] == kNoRow) continue;
    const int row = i * 32 + lane;
    dev::bulk_copy_g2s(tile.slot + tile_offset<Traits, D, kRows>(row, 0), tile.base + uint64_t(offsets[i]) * tile.unit,
                       D * 2, full);
  }
}

template <class Traits>
__device__ __forceinline__ void run(const DecodeParams& p, const SharedViews<Traits>& smem, int loader_warp) {
  static_assert(!Traits::kBulk || kLoaderWarps == 1, "one warp announces the bytes of a tile");
  const uint32_t unit = 1u << p.unit_shift;
  RingCursor slot, segment;
  const auto load_tile = [&](auto dims, auto rows, uint64_t base, const uint32_t* map, int tokens) {
    constexpr int kD = decltype(dims)::value, kRows = decltype(rows)::value;
    if (slot.lapped) dev::mbarrier_wait(smem.slot_empty + slot.slot, slot.phase ^ 1);
    const Tile tile{smem.slots + slot.slot * Traits::kTile.slot_bytes, reinterpret_cast<const unsigned char*>(base),
                    map, min((tokens + 15) & ~15, kRows), unit};
    if constexpr (Traits::kBulk) {
      copy_by_engine<Traits, kD, kRows>(tile, smem.slot_full + slot.slot);
    } else {
      copy_by_threads<Traits, kD, kRows>(tile, smem.slot_full + slot.slot, loader_warp);
    }
    slot.advance(p.smem.num_slots);
  };

  for (;;) {
    uint64_t* mapped = smem.map_full + segment.slot * Traits::kTilesK;
    dev::mbarrier_wait(mapped, segment.phase);
    SegmentSource source = dev::load(&smem.segments[segment.slot].source);
    source.k_base = dev::keep<true>(source.k_base);  // both loads travel together
    const int tokens = dev::load(&smem.segments[segment.slot].info).tokens;
    if (tokens < 0) break;
    for (int first = 0; first < tokens;) {
      load_tile(Constant<Traits::kDk>{}, Constant<Traits::kRowsK>{}, source.k_base, smem.map_k(segment.slot) + first,
                tokens - first);
      first += Traits::kRowsK;
      if (first < tokens) dev::mbarrier_wait(++mapped, segment.phase);
    }
    for (int first = 0; first < tokens; first += Traits::kRowsV) {
      load_tile(Constant<Traits::kDv>{}, Constant<Traits::kRowsV>{}, source.v_base, smem.map_v(segment.slot) + first,
                tokens - first);
    }
    __syncwarp();  // all lanes have read the map
    if ((threadIdx.x & 31) == 0) dev::mbarrier_arrive(smem.map_empty + segment.slot);
    segment.advance(kMapSlots);
  }
  if constexpr (!Traits::kBulk) dev::cp_async_wait_all();  // a thread must not exit with copies in flight
}

}  // namespace nsa_sel::loader

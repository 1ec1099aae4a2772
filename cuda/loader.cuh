// loader.cuh - the warps that keep the ring full: K tiles of a segment, then its V tiles, then the next segment's K.
#pragma once
#include "traits.cuh"

namespace nsa_sel::loader {

// One tile of up to kRows rows of D elements into a slot. Rows behind the last valid one, and rows whose page does not
// exist, become zeros up to whole MMA tiles: stale bits there could be NaN, and 0 * NaN would reach the sum.
struct Tile {
  unsigned char* slot;
  const unsigned char* base;
  const uint32_t* map;  // of the tile's first row
  int valid;            // rows that the segment still has
  uint32_t unit;        // bytes of one step of an offset
  __device__ __forceinline__ int filled_rows(int rows) const { return min((valid + 15) / 16 * 16, rows); }
  __device__ __forceinline__ uint32_t offset(int row) const { return row < valid ? dev::load(map + row) : kNoRow; }
  __device__ __forceinline__ const unsigned char* row_address(uint32_t offset) const {
    return base + uint64_t(offset) * unit;
  }
};

// cp.async: four rows and one 128-byte slab an instruction, so that a row's slab is one full line of global memory.
// What counts here is instructions a row, because one warp feeds the ring: map entries come into registers first
// (behind a copy, each would cost its latency again), and eight rows at a time leave two swizzle patterns and immediate
// offsets.
template <class Traits, int D, int kRows>
__device__ __forceinline__ void copy_by_threads(const Tile& tile, uint64_t* full, int loader_warp) {
  constexpr int kOctets = kRows / 8 / kLoaderWarps;
  static_assert(kOctets * 8 * kLoaderWarps == kRows, "loader warps share a tile's rows evenly");
  const int lane = threadIdx.x & 31;
  const int chunk = lane & 7, quad_row = lane >> 3;
  uint32_t offsets[kOctets][2];
#pragma unroll
  for (int i = 0; i < kOctets; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      offsets[i][half] = tile.offset((loader_warp + i * kLoaderWarps) * 8 + half * 4 + quad_row);
    }
  const int stop = tile.filled_rows(kRows);
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int row = (loader_warp + i * kLoaderWarps) * 8;
    if (row >= stop) break;  // stop is a multiple of 16
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool present = offsets[i][half] != kNoRow;
      const unsigned char* src = tile.row_address(present ? offsets[i][half] : 0u) + chunk * 16;
      unsigned char* dst = tile.slot + row * 128 + slab_offset(kRows, half * 4 + quad_row, chunk);
#pragma unroll
      for (int slab = 0; slab < D / 64; ++slab) {
        dev::cp_async_16(dst + slab * kRows * 128, src + slab * 128, present);
      }
    }
  }
  dev::cp_async_arrive(full);
}

// Bulk copies: a lane moves a whole row with one instruction.
template <class Traits, int D, int kRows>
__device__ __forceinline__ void copy_by_engine(const Tile& tile, uint64_t* full) {
  constexpr int kRounds = (kRows + 31) / 32;
  const int lane = threadIdx.x & 31, stop = tile.filled_rows(kRows);
  uint32_t offsets[kRounds];
  int present = 0;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = i * 32 + lane;
    offsets[i] = tile.offset(row);
    present += __popc(__ballot_sync(0xffffffffu, offsets[i] != kNoRow));
    if (row < stop && offsets[i] == kNoRow) {
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
    dev::bulk_copy_g2s(tile.slot + tile_offset<Traits, D, kRows>(row, 0), tile.row_address(offsets[i]), D * 2, full);
  }
}

template <class Traits>
__device__ __forceinline__ void run(const DecodeParams& p, const SharedViews<Traits>& smem, int loader_warp) {
  static_assert(!Traits::kBulk || kLoaderWarps == 1, "one warp announces the bytes of a tile");
  const uint32_t unit = 1u << p.unit_shift;
  RingCursor slot, segment;
  const auto load_tiles = [&](auto dims, auto rows, uint64_t base, const uint32_t* map, int tokens) {
    constexpr int kD = decltype(dims)::value, kRows = decltype(rows)::value;
    for (int first = 0; first < tokens; first += kRows) {
      dev::mbarrier_wait(smem.slot_empty + slot.slot, slot.phase ^ 1);
      const Tile tile{smem.slots + slot.slot * Traits::kTile.slot_bytes, reinterpret_cast<const unsigned char*>(base),
                      map + first, min(tokens - first, kRows), unit};
      if constexpr (Traits::kBulk) {
        copy_by_engine<Traits, kD, kRows>(tile, smem.slot_full + slot.slot);
      } else {
        copy_by_threads<Traits, kD, kRows>(tile, smem.slot_full + slot.slot, loader_warp);
      }
      slot.advance(p.smem.num_slots);
    }
  };

  for (;;) {
    dev::mbarrier_wait(smem.map_full + segment.slot, segment.phase);
    const int tokens = dev::load(&smem.segments[segment.slot].info).tokens;
    if (tokens < 0) break;
    const SegmentSource source = dev::load(&smem.segments[segment.slot].source);
    load_tiles(Constant<Traits::kDk>{}, Constant<Traits::kRowsK>{}, source.k_base, smem.map_k(segment.slot), tokens);
    load_tiles(Constant<Traits::kDv>{}, Constant<Traits::kRowsV>{}, source.v_base, smem.map_v(segment.slot), tokens);
    __syncwarp();  // all lanes have read the map
    if ((threadIdx.x & 31) == 0) dev::mbarrier_arrive(smem.map_empty + segment.slot);
    segment.advance(kMapSlots);
  }
  if constexpr (!Traits::kBulk) dev::cp_async_wait_all();  // a thread must not exit with copies in flight
}

}  // namespace nsa_sel::loader

// loader.cuh - the warps that keep the ring full: K tiles of a segment, then its V tiles, then the next segment's K.
#pragma once
#include "traits.cuh"

namespace nsa_sel::loader {

// One tile of `rows` rows of D elements into a slot. Four rows and one 128-byte slab an instruction: a row's slab is
// one full line of global memory. Rows behind the last valid one are zeros up to whole MMA tiles: stale bits there
// could be NaN, and 0 * NaN would reach the sum.
template <int D, int kRows>
__device__ __forceinline__ void load_tile(unsigned char* slot, const unsigned char* base, const uint32_t* map,
                                          int valid, int unit_shift, int loader_warp) {
  const int lane = threadIdx.x & 31;
  const int row_in_group = lane >> 3, chunk = lane & 7;
  const int stop = min((valid + 15) / 16 * 16, kRows);
#pragma unroll 4
  for (int group = loader_warp; group * 4 < stop; group += kLoaderWarps) {
    const int row = group * 4 + row_in_group;
    const uint32_t offset = row < valid ? dev::load(map + row) : kNoRow;
    const bool present = offset != kNoRow;
    const unsigned char* src = base + (present ? uint64_t(offset) << unit_shift : 0) + chunk * 16;
    unsigned char* dst = slot + slab_offset(kRows, row, chunk);
#pragma unroll
    for (int slab = 0; slab < D / 64; ++slab) {
      dev::cp_async_16(dst + slab * kRows * 128, src + slab * 128, present);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void run(const DecodeParams& p, const SharedViews<Traits>& smem, int loader_warp) {
  RingCursor slot, segment;
  const auto load_tiles = [&](auto dims, auto rows, uint64_t base, const uint32_t* map, int tokens) {
    constexpr int kD = decltype(dims)::value, kRows = decltype(rows)::value;
    for (int first = 0; first < tokens; first += kRows) {
      dev::mbarrier_wait(smem.slot_empty + slot.slot, slot.phase ^ 1);
      load_tile<kD, kRows>(smem.slots + slot.slot * Traits::kTile.slot_bytes,
                           reinterpret_cast<const unsigned char*>(base), map + first, min(tokens - first, kRows),
                           p.unit_shift, loader_warp);
      dev::cp_async_arrive(smem.slot_full + slot.slot);
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
  dev::cp_async_wait_all();  // a thread must not exit with copies in flight
}

}  // namespace nsa_sel::loader

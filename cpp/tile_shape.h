// tile_shape.h - the compile-time numbers of a kernel instance and the shared memory they imply.
//
// One constexpr source for the device traits, the planner, the table of facts and the tests.
#pragma once
#include <cstdint>

#include "params.h"

#if defined(__CUDACC__)
#define NSA_SEL_HOST_DEVICE __host__ __device__
#else
#define NSA_SEL_HOST_DEVICE
#endif

namespace nsa_sel {

constexpr int kConsumerWarps = 4;
constexpr int kLoaderWarps = 1;
constexpr int kDecodeThreads = 32 * (kConsumerWarps + kLoaderWarps + 1);  // + the mapper warp
constexpr int kMapSlots = 3;  // segments whose row map exists at once: consumed, loading, being built
constexpr int kSegmentHeaderBytes = 32;
constexpr int kRowScalesBytes = 8;

struct TileShape {
  int Dk, Dv;
  int head_tile;    // most heads that the instance takes
  int head_warps;   // consumer warps that split the heads ...
  int token_warps;  // ... and the tokens (pass 1) or the columns of V (pass 2)
  int units;        // units of 8 heads a warp holds
  Loads loads;
  Cache cache;
  int cache_bytes;    // of an element of K or V
  int max_slots;      // of the ring
  int row_padding;    // bytes behind a row in a slot: 0 where rows are swizzled slabs
  int slot_bytes;     // one ring slot
  int rows_k;         // K rows in a slot
  int rows_v;         // V rows in a slot
  int segment;        // tokens whose logits are in registers at once: a multiple of rows_k and rows_v
  int blocks_per_sm;  // what the registers allow (the launch bound)
};

constexpr int bytes_of(Cache cache) { return cache == Cache::kFloat8E4m3 ? 1 : 2; }
constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// 16 heads: four warps split the tokens of a 64-row tile and each holds all heads. 32 and 64 heads: two warps split the
// tokens of a 32-row tile and two the heads, which halves a thread's share of O and logits per tile, the slot (so that
// two fit beside Q and P in 99 KB) and the number of times Q is read from shared memory.
//
// A bulk copy moves a row as one piece and cannot swizzle it: 16 bytes of padding a row then keep ldmatrix free of bank
// conflicts.
//
// A float8 cache has slots of as many rows, so of half the bytes; where one block has an SM to itself, twice as many.
constexpr TileShape tile_shape(int Dk, int Dv, int head_tile, Loads loads = Loads::kCpAsync,
                               Cache cache = Cache::kSame) {
  TileShape t{};
  t.loads = loads;
  t.cache = cache;
  t.cache_bytes = bytes_of(cache);
  t.max_slots = cache == Cache::kFloat8E4m3 && head_tile > 32 ? 32 : 16;
  t.row_padding = loads == Loads::kBulk ? 16 : 0;
  t.Dk = Dk;
  t.Dv = Dv;
  t.head_tile = head_tile;
  t.head_warps = head_tile > 16 ? 2 : 1;
  t.token_warps = kConsumerWarps / t.head_warps;
  t.units = head_tile / 8 / t.head_warps;
  const int base_rows = 16 * t.token_warps;
  const int data_bytes = base_rows * (Dk > Dv ? Dk : Dv) * t.cache_bytes;
  t.rows_k = data_bytes / (t.cache_bytes * Dk);
  t.rows_v = data_bytes / (t.cache_bytes * Dv);
  const int padding = t.row_padding * (t.rows_k > t.rows_v ? t.rows_k : t.rows_v);
  t.slot_bytes = (data_bytes + padding + 127) / 128 * 128;
  const int step = t.rows_k / gcd(t.rows_k, t.rows_v) * t.rows_v;
  const int wanted = 4096 / head_tile;  // 32 registers of logits a thread
  t.segment = wanted / step > 0 ? wanted / step * step : step;
  t.blocks_per_sm = head_tile > 32 ? 1 : 2;
  return t;
}

// A cluster's partial O in shared memory: four floats of padding a head put the four heads that a warp's store meets
// into different banks.
constexpr int cluster_head_stride(int Dv) { return Dv + 4; }

constexpr NSA_SEL_HOST_DEVICE int units_of(int h) { return (h + 7) / 8; }
constexpr uint32_t align_up(uint32_t x, uint32_t a) { return (x + a - 1) / a * a; }

// Everything but the ring has the size of the head tile, so that its offsets are immediates of the device's
// instructions; the ring comes last. At NSA's shape (192/128, h = 16): barriers 368 + headers 96 + map 4,608 + max and
// sum 512 + Q 6,144
// + P 6,144, to a multiple of 1,024: 18,432, and 24,576 a slot.
constexpr SmemLayout smem_layout(const TileShape& t, int num_slots) {
  SmemLayout s{};
  uint32_t at = 0;
  s.num_slots = num_slots;
  const bool scaled = t.cache == Cache::kFloat8E4m3;
  // Ring full and empty (of as many slots as there may be), a map's tiles full and the map empty, Q full and empty; the
  // scales of a map's tokens.
  s.num_barriers = 2 * t.max_slots + kMapSlots * (t.segment / t.rows_k + 1) + 2 + (scaled ? kMapSlots : 0);
  s.barriers = at, at = align_up(at + uint32_t(s.num_barriers) * 8, 16);
  s.segments = at, at += uint32_t(kMapSlots * kSegmentHeaderBytes);
  s.map = at, at += uint32_t(kMapSlots * 2 * t.segment * 4);
  s.scales = at, at += scaled ? align_up(uint32_t(kMapSlots * (2 * t.segment * 4 + kRowScalesBytes)), 16) : 0;
  s.row_max = at, at += uint32_t(t.token_warps * t.head_tile * 4);
  s.row_sum = at, at = align_up(at + uint32_t(t.token_warps * t.head_tile * 4), 128);
  s.q = at, at += uint32_t(t.head_tile * t.Dk * 2);
  s.p = at, at = align_up(at + uint32_t(t.head_tile * t.segment * 2), 1024);
  s.slots = at, at += uint32_t(num_slots * t.slot_bytes);
  s.total = align_up(at, 128);
  return s;
}

}  // namespace nsa_sel

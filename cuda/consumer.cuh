// consumer.cuh - the four warps that compute: logits of a segment in registers, exact max, probabilities, O += P V.
//
// Tokens are the M side of every MMA and heads the N side, in units of 8: S^T = K Q^T and O^T = V^T P^T. A thread of a
// fragment always holds the same heads (2t and 2t+1 of each unit, t = lane % 4), so max, sum and rescaling stay in
// registers; only the max over other warps' tokens and P itself go through shared memory.
//
// A float8 cache is widened between ldmatrix, which moves pairs of codes, and the MMA. Of a row of K a thread then
// holds four neighbouring columns, not two and two: Q's fragments are taken in the same order. Of V it holds tokens 2t
// and 2t + 1 in columns 2g and 2g + 1 of a tile of 16, which are rows g and g + 8 of the MMA: O's columns are in that
// order.
#pragma once
#include "softmax_state.cuh"
#include "traits.cuh"

namespace nsa_sel::consumer {

template <class Traits>
struct Consumer {
  using T = typename Traits::T;
  static constexpr int kUnits = Traits::kUnits, kRowsK = Traits::kRowsK, kRowsV = Traits::kRowsV;
  static constexpr int kHeads = Traits::kHeadTile;
  static constexpr int kGroupThreads = 32 * Traits::kTokenWarps;  // the warps that share a set of heads

  // Bytes of a slab's row, of a slab and from a row to the next, in a tile of K or V.
  static constexpr int kWidthK = slab_bytes(Traits::kDk * Traits::kCacheBytes);
  static constexpr int kWidthV = slab_bytes(Traits::kDv * Traits::kCacheBytes);
  static constexpr int kSlabK = Traits::kBulk ? 128 : kRowsK * kWidthK;
  static constexpr int kRowK = Traits::kBulk ? Traits::kDk * 2 + Traits::kTile.row_padding : kWidthK;
  static constexpr int kRowV = Traits::kBulk ? Traits::kDv * 2 + Traits::kTile.row_padding : kWidthV;
  static constexpr int kPairsK = kWidthK / 32;             // ldmatrix of one slab
  static constexpr int kLoadsK = Traits::kFloat8 ? 1 : 2;  // ldmatrix of 32 columns of K
  static constexpr int kStepsK = kPairsK / kLoadsK;        // times 32 columns of a slab
  static constexpr int kTilesV =
      Traits::kFloat8 ? (Traits::kColumnTiles > 1 ? 2 : 1) : 1;  // column tiles of an ldmatrix
  static constexpr int kLoadsV = Traits::kColumnTiles / kTilesV;

  const DecodeParams& p;
  const SharedViews<Traits> smem;
  const int lane, g, t;  // g = lane / 4: token or column in a fragment; t = lane % 4: pair of heads
  const int head_warp, token_warp;
  const int first_unit;      // of this warp's heads
  const int used_units;      // units of 8 heads that the row has for this warp: 1 at least
  int q_offset[2];           // in Q, by half a slab
  int k_offset[kPairsK];     // in a K tile, of this lane's row of each ldmatrix, by pair of chunks in a slab
  int v_offset[kLoadsV];     // in a V tile, by ldmatrix
  int p_offset[kUnits / 2];  // in P, by pair of units; a unit that the row does not have reads another
                             // one's place
  RingCursor slot, segment;
  uint32_t q_phase = 0;

  uint32_t q_fragments[Traits::kQInRegisters ? Traits::kDk / 32 : 1][kUnits][4];
  float logits[Traits::kTilesK][Traits::kSubTiles][kUnits][4];
  float o[Traits::kColumnTiles][kUnits][4];
  SoftmaxState<2 * kUnits> state;
  using Values = ValueScale<Traits::kFloat8 && dev::kIsHalf<T>>;
  Values value_scale;

  __device__ __forceinline__ Consumer(const DecodeParams& params, const SharedViews<Traits>& views, int warp)
      : p(params),
        smem(views),
        lane(int(threadIdx.x) & 31),
        g(lane >> 2),
        t(lane & 3),
        head_warp(Traits::kTile.head_warps == 1 ? 0 : warp / Traits::kTokenWarps),
        token_warp(Traits::kTile.head_warps == 1 ? warp : warp % Traits::kTokenWarps),
        first_unit(head_warp * kUnits),
        used_units(units_of(params.h) - first_unit) {
    // Kept in registers: what is left to add for a tile, a slab or 16 rows are immediates of the ldmatrix.
#pragma unroll
    for (int j = 0; j < 2; ++j)
      q_offset[j] =
          dev::keep<Traits::kKeepOffsets>(Traits::kFloat8 ? q_chunk_offset<Traits>(g, 4 * j + (t >> 1)) + (t & 1) * 8
                                                          : q_chunk_offset<Traits>(lane & 7, 4 * j + (lane >> 3)));
#pragma unroll
    for (int c = 0; c < kPairsK; ++c) {
      k_offset[c] = dev::keep<Traits::kKeepOffsets>(
          tile_offset<Traits, Traits::kDk, kRowsK>(token_warp * 16 + (lane & 15), 2 * c + (lane >> 4)));
    }
#pragma unroll
    for (int c = 0; c < kLoadsV; ++c) {
      // 16 bit: two chunks are a tile of columns, tokens 8..15 behind both. Float8: a chunk is a tile, of all 16
      // tokens.
      const int chunk = Traits::kFloat8 ? token_warp * Traits::kColumnTiles + c * kTilesV + (lane >> 4) % kTilesV
                                        : (token_warp * Traits::kColumnTiles + c) * 2 + ((lane >> 3) & 1);
      const int row = Traits::kFloat8 ? lane & 15 : (lane >> 4) * 8 + (lane & 7);
      v_offset[c] = dev::keep<Traits::kKeepOffsets>(tile_offset<Traits, Traits::kDv, kRowsV>(row, chunk));
    }
#pragma unroll
    for (int pair = 0; pair < kUnits / 2; ++pair) {
      const int unit = min(2 * pair + (lane >> 4), used_units - 1);
      p_offset[pair] = dev::keep<Traits::kKeepOffsets>((unit * Traits::kSegment + (lane & 15)) * 16);
    }
  }
  // Units beyond the row's heads are skipped, not padded: the test is the same for all lanes.
  __device__ __forceinline__ bool has_unit(int u) const { return u == 0 || u < used_units; }

  // The warps that share a set of heads meet. The id is an immediate: one in a register would cost every other barrier
  // of the kernel its own.
  __device__ __forceinline__ void group_sync() const {
    if (head_warp == 0) {
      dev::named_barrier_sync(kHeadWarpBarrier, kGroupThreads);
    } else {
      dev::named_barrier_sync(kHeadWarpBarrier + 1, kGroupThreads);
    }
  }

  // Arrivals below are by lane 0 behind a __syncwarp: it orders every lane's reads before the slot is given back.
  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    if (lane == 0) dev::mbarrier_arrive(barrier);
  }

  // Unit u's heads by half a slab, 32 columns: the fragments of two MMAs.
  __device__ __forceinline__ void load_q_fragment(uint32_t (&r)[4], int u, int slab, int half) const {
    const unsigned char* q = reinterpret_cast<const unsigned char*>(smem.q) + (first_unit + u) * 8 * 128;
    if constexpr (Traits::kFloat8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = q_offset[half] ^ i * 32;  // two chunks on
        const uint2 four = dev::load(reinterpret_cast<const uint2*>(q + at + slab * kHeads * 128));
        r[2 * i] = four.x, r[2 * i + 1] = four.y;
      }
    } else {
      dev::ldmatrix_x4(r, q + q_offset[half] + slab * kHeads * 128);
    }
  }
  // K's fragment of MMA `i` of 32 columns, as ldmatrix gave it.
  __device__ __forceinline__ static void key_fragment(uint32_t (&a)[4], const uint32_t (&loaded)[kLoadsK][4], int i) {
    if constexpr (Traits::kFloat8) {
      dev::widen_low_high<T>(loaded[0][2 * i], a[0], a[2]);
      dev::widen_low_high<T>(loaded[0][2 * i + 1], a[1], a[3]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = loaded[i][e];
    }
  }

  __device__ __forceinline__ void begin_item() {
    state.init();
    value_scale.init(p.v_scale.per_token);
#pragma unroll
    for (int c = 0; c < Traits::kColumnTiles; ++c)
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][u][e] = 0.0f;
    dev::mbarrier_wait(smem.q_full, q_phase);
    q_phase ^= 1;
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int j = 0; j < Traits::kDk / 32; ++j)
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
          if (has_unit(u)) load_q_fragment(q_fragments[j][u], u, j / 2, j % 2);
      __syncwarp();
      arrive(smem.q_empty);
    }
  }

  // One m16 tile of K, `sub` steps behind the warp's first, against all heads of the warp. Where registers allow, the
  // next fragments are asked for before the current ones are multiplied.
  __device__ __forceinline__ void multiply_keys(const unsigned char* tile, int sub, float (&acc)[kUnits][4]) {
    constexpr int kSets = Traits::kAccumulatorSets, kSlabs = Traits::kDk * Traits::kCacheBytes / kWidthK;
    float sums[kSets][kUnits][4] = {};
    uint32_t loaded[2][kLoadsK][4];  // of 32 columns
    const auto load = [&](int slab, int step) {
#pragma unroll
      for (int i = 0; i < kLoadsK; ++i) {
        dev::ldmatrix_x4(loaded[step & 1][i],
                         tile + k_offset[kLoadsK * step + i] + slab * kSlabK + sub * 16 * Traits::kTokenWarps * kRowK);
      }
    };
    if (Traits::kFragmentsAhead) load(0, 0);
    // Unrolled at 64 heads, the scheduler fetches so much of Q ahead that registers spill.
#pragma unroll(Traits::kHeadTile > 32 ? 1 : kSlabs)
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int step = 0; step < kStepsK; ++step) {
        if (!Traits::kFragmentsAhead) load(slab, step);
        if (Traits::kFragmentsAhead && step + 1 < kStepsK) load(slab, step + 1);
        if (Traits::kFragmentsAhead && step + 1 == kStepsK && slab + 1 < kSlabs) load(slab + 1, 0);
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) key_fragment(a[i], loaded[step & 1], i);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          if (!has_unit(u)) continue;
          uint32_t b[4];
          if constexpr (Traits::kQInRegisters) {
#pragma unroll
            for (int e = 0; e < 4; ++e) b[e] = q_fragments[kStepsK * slab + step][u][e];
          } else {
            load_q_fragment(b, u, slab * (kStepsK / 2) + step / 2, step % 2);
          }
          dev::mma_m16n8k16<T>(sums[0][u], a[0], b[0], b[1]);
          dev::mma_m16n8k16<T>(sums[kSets - 1][u], a[1], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[u][e] = kSets == 1 ? sums[0][u][e] : sums[0][u][e] + sums[kSets - 1][u][e];
  }

  // What logits are multiplied by: the tile's rows g and g + 8 from `position` on.
  struct LogitScales {
    float low, high;
  };
  __device__ __forceinline__ LogitScales logit_scales(float of_row, int position) const {
    if constexpr (Traits::kFloat8) {
      if (!p.k_scale.per_token) return {of_row, of_row};
      const float* scales = smem.scales_k(segment.slot) + position;
      return {of_row * dev::load(scales), of_row * dev::load(scales + 8)};
    } else {
      return {p.scale_log2, p.scale_log2};
    }
  }

  // Without a page table every position under `tokens` has a row.
  __device__ __forceinline__ bool selected(int position, int tokens) const {
    return position < tokens && (p.page_size == 0 || dev::load(smem.map_k(segment.slot) + position) != kNoRow);
  }

  // Pass 1: base-2 logits of the whole segment into registers; tokens that do not exist are -inf.
  __device__ __forceinline__ void compute_logits(int tokens) {
    float of_row = 0.0f;
    if constexpr (Traits::kFloat8) of_row = dev::load(&smem.row_scales[segment.slot].logits);
#pragma unroll
    for (int kt = 0; kt < Traits::kTilesK; ++kt) {
      if (kt * kRowsK >= tokens) break;
      if (kt > 0 && p.page_size > 0) smem.wait_for_mapped_tile(segment, kt);  // its map is read below
      dev::mbarrier_wait(smem.slot_full + slot.slot, slot.phase);
      const unsigned char* tile = smem.slots + slot.slot * Traits::kTile.slot_bytes;
#pragma unroll
      for (int sub = 0; sub < Traits::kSubTiles; ++sub) {
        const int row0 = (sub * Traits::kTokenWarps + token_warp) * 16;
        if (kt * kRowsK + row0 < tokens) multiply_keys(tile, sub, logits[kt][sub]);
      }
      __syncwarp();
      arrive(smem.slot_empty + slot.slot);
      slot.advance(p.smem.num_slots);
      if constexpr (Traits::kFloat8) {
        if (kt == 0 && (p.k_scale.per_token || p.v_scale.per_token)) {
          dev::mbarrier_wait(smem.scales_full + segment.slot, segment.phase);
        }
      }
#pragma unroll
      for (int sub = 0; sub < Traits::kSubTiles; ++sub) {
        const int first = kt * kRowsK + (sub * Traits::kTokenWarps + token_warp) * 16, position = first + g;
        if (Traits::kFloat8 && first >= tokens) continue;
        const LogitScales scale = logit_scales(of_row, position);
        if (p.page_size == 0 && first + 16 <= tokens) {
#pragma unroll
          for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int e = 0; e < 4; ++e) logits[kt][sub][u][e] *= e < 2 ? scale.low : scale.high;
          continue;
        }
        const bool low = selected(position, tokens), high = selected(position + 8, tokens);
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = logits[kt][sub][u][e];
            x = (e < 2 ? low : high) ? x * (e < 2 ? scale.low : scale.high) : -INFINITY;
          }
      }
    }
  }

  // Reduces each of a thread's 2 * kUnits values over the eight lanes that hold the same heads. Lanes exchange halves
  // of their values while there are any, so that N values take N - 1 shuffles and not 3 N; a lane ends with the value
  // of head (first_unit * 8 + head_of_lane()).
  template <class Op>
  __device__ __forceinline__ float fold(float (&v)[2 * kUnits], const Op& op) const {
    int step = 16;
#pragma unroll
    for (int n = kUnits; n >= 1; n /= 2, step /= 2) {
      const bool upper = (lane & step) != 0;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float mine = upper ? v[i + n] : v[i], theirs = upper ? v[i] : v[i + n];
        v[i] = op(mine, __shfl_xor_sync(0xffffffffu, theirs, step));
      }
    }
    if (step == 4) v[0] = op(v[0], __shfl_xor_sync(0xffffffffu, v[0], 4));
    return v[0];
  }
  __device__ __forceinline__ int head_of_lane() const {
    const int index = kUnits == 2 ? lane >> 3 : lane >> 2;  // 2 * unit + (head & 1)
    return (index >> 1) * 8 + 2 * t + (index & 1);
  }
  // Every thread's heads over all warps of the group, from `shares` [token warps][head tile]; in warp order, so that
  // two runs give the same bits.
  template <class Op>
  __device__ __forceinline__ void exchange(float* shares, float (&v)[2 * kUnits], const Op& op) const {
    const float mine = fold(v, op);
    if (kUnits > 2 || (lane & 4) == 0) {
      dev::store(shares + token_warp * kHeads + first_unit * 8 + head_of_lane(), mine);
    }
    group_sync();
#pragma unroll
    for (int w = 0; w < Traits::kTokenWarps; ++w)
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float2 share =
            dev::load(reinterpret_cast<const float2*>(shares + w * kHeads + (first_unit + u) * 8 + 2 * t));
        v[2 * u] = w == 0 ? share.x : op(v[2 * u], share.x);
        v[2 * u + 1] = w == 0 ? share.y : op(v[2 * u + 1], share.y);
      }
  }

  // Of the segment's tokens. Every warp looks at all of them.
  __device__ __forceinline__ float largest_value_scale(int tokens) const {
    float largest = 0.0f;
    for (int i = lane; i < tokens; i += 32) largest = fmaxf(largest, fabsf(dev::load(smem.scales_v(segment.slot) + i)));
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
  }

  // The exact max of the segment over all tokens, folded into the state; O is brought to the new max.
  __device__ __forceinline__ void update_max(int tokens, bool first_segment) {
    float local[2 * kUnits];
#pragma unroll
    for (int i = 0; i < 2 * kUnits; ++i) local[i] = -INFINITY;
#pragma unroll
    for (int kt = 0; kt < Traits::kTilesK; ++kt)
#pragma unroll
      for (int sub = 0; sub < Traits::kSubTiles; ++sub) {
        if (kt * kRowsK + (sub * Traits::kTokenWarps + token_warp) * 16 >= tokens) continue;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          if (!has_unit(u)) continue;
          const float (&x)[4] = logits[kt][sub][u];
          local[2 * u] = fmaxf(local[2 * u], fmaxf(x[0], x[2]));
          local[2 * u + 1] = fmaxf(local[2 * u + 1], fmaxf(x[1], x[3]));
        }
      }
    exchange(smem.row_max, local, [](float a, float b) { return fmaxf(a, b); });
    float shrink = 1.0f;
    if constexpr (Values::kUsed) {
      if (p.v_scale.per_token) shrink = value_scale.raise(largest_value_scale(tokens));
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) continue;
      const float factor[2] = {state.raise(2 * u, local[2 * u]), state.raise(2 * u + 1, local[2 * u + 1])};
      if (first_segment) continue;  // O is zero
#pragma unroll
      for (int c = 0; c < Traits::kColumnTiles; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][u][e] *= factor[e & 1] * shrink;
    }
  }

  // Probabilities to shared memory as [unit][token][8 heads]: a warp's store covers 128 neighbouring bytes.
  __device__ __forceinline__ void store_probabilities(int tokens) {
#pragma unroll
    for (int kt = 0; kt < Traits::kTilesK; ++kt)
#pragma unroll
      for (int sub = 0; sub < Traits::kSubTiles; ++sub) {
        const int position = kt * kRowsK + (sub * Traits::kTokenWarps + token_warp) * 16;
        if (position >= tokens) continue;
        float of_token[2] = {1.0f, 1.0f};  // rows g and g + 8
        if constexpr (Traits::kFloat8) {
          if (p.v_scale.per_token) {
            const float* scales = smem.scales_v(segment.slot) + position + g;
            const float unit = value_scale.inverse();
            of_token[0] = dev::load(scales) * unit, of_token[1] = dev::load(scales + 8) * unit;
          }
        }
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          if (!has_unit(u)) continue;
          float weights[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            weights[e] = state.weight(2 * u + (e & 1), logits[kt][sub][u][e]);
            state.sum[2 * u + (e & 1)] += weights[e];
            if (Traits::kFloat8) weights[e] *= of_token[e / 2];
          }
          uint32_t* row =
              reinterpret_cast<uint32_t*>(smem.p + ((first_unit + u) * Traits::kSegment + position + g) * 8) + t;
          dev::store(row, dev::pack2<T>(weights[0], weights[1]));
          dev::store(row + 8 * 4, dev::pack2<T>(weights[2], weights[3]));
        }
      }
    group_sync();
  }

  // Fragments of 16 tokens: V's columns of this warp, and the probabilities of its heads.
  struct ValueStep {
    uint32_t a[kLoadsV][4];
    uint32_t b[kUnits][2];
  };
  __device__ __forceinline__ void load_values(ValueStep& step, const unsigned char* tile, int row0,
                                              const unsigned char* probabilities) const {
#pragma unroll
    for (int pair = 0; pair < kUnits / 2; ++pair) {
      uint32_t r[4];
      dev::ldmatrix_x4_trans(r, probabilities + p_offset[pair] + row0 * 16);
#pragma unroll
      for (int e = 0; e < 4; ++e) step.b[2 * pair + e / 2][e % 2] = r[e];
    }
#pragma unroll
    for (int c = 0; c < kLoadsV; ++c) {
      dev::ldmatrix_x4_trans(step.a[c], tile + v_offset[c] + row0 * kRowV);
    }
  }
  __device__ __forceinline__ void multiply_values(const ValueStep& step) {
#pragma unroll
    for (int c = 0; c < Traits::kColumnTiles; ++c) {
      uint32_t a[4];
      value_fragment(a, step.a[c / kTilesV], c % kTilesV);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (has_unit(u)) dev::mma_m16n8k16<T>(o[c][u], a, step.b[u][0], step.b[u][1]);
      }
    }
  }
  // V's fragment of column tile `i` of an ldmatrix.
  __device__ __forceinline__ static void value_fragment(uint32_t (&a)[4], const uint32_t (&loaded)[4], int i) {
    if constexpr (Traits::kFloat8) {
      dev::widen_even_odd<T>(loaded[2 * i], a[0], a[1]);
      dev::widen_even_odd<T>(loaded[2 * i + 1], a[2], a[3]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = loaded[e];
    }
  }

  // Pass 2: every warp of the group owns kDv / kTokenWarps columns of O.
  __device__ __forceinline__ void accumulate_values(int tokens) {
    const unsigned char* probabilities =
        reinterpret_cast<const unsigned char*>(smem.p) + first_unit * Traits::kSegment * 16;
    for (int left = tokens; left > 0; left -= kRowsV) {
      dev::mbarrier_wait(smem.slot_full + slot.slot, slot.phase);
      const unsigned char* tile = smem.slots + slot.slot * Traits::kTile.slot_bytes;
      if (Traits::kFragmentsAhead && left >= kRowsV) {
        ValueStep steps[2];
        load_values(steps[0], tile, 0, probabilities);
#pragma unroll
        for (int s = 0; s < kRowsV / 16; ++s) {
          if (s + 1 < kRowsV / 16) load_values(steps[(s + 1) & 1], tile, (s + 1) * 16, probabilities);
          multiply_values(steps[s & 1]);
        }
      } else {
#pragma unroll
        for (int row0 = 0; row0 < kRowsV; row0 += 16) {
          if (row0 >= left) break;
          ValueStep step;
          load_values(step, tile, row0, probabilities);
          multiply_values(step);
        }
      }
      __syncwarp();
      arrive(smem.slot_empty + slot.slot);
      slot.advance(p.smem.num_slots);
      probabilities += kRowsV * 16;
    }
  }

  // Adds up the threads' shares of each head's sum.
  __device__ __forceinline__ void reduce_sums() {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) state.sum[2 * u] = state.sum[2 * u + 1] = 0.0f;
    }
    exchange(smem.row_sum, state.sum, [](float a, float b) { return a + b; });
  }

  // The thread's place in fragments once more, for the ends of an item: kept apart, so that nothing made of it is worth
  // a register from one item to the next.
  struct Place {
    int thread, g, t, token_warp;
  };
  __device__ __forceinline__ Place place() const {
    const int thread = dev::keep<Traits::kKeepOffsets>(int(threadIdx.x));
    return {thread, (thread & 31) >> 2, thread & 3, (thread >> 5) % Traits::kTokenWarps};
  }

  // What an item's end needs of the sums, while the last V is still on its way. Of a whole row that is lse, and the
  // inverse in the sum's place; a split hands its sum on.
  __device__ __forceinline__ void finish_sums(const SegmentInfo& info) {
    reduce_sums();
    if (info.split >= 0) return;
    const auto [thread, g, t, token_warp] = place();
    if (p.lse != nullptr && token_warp == 0 && g == 0) {
      const RowIndex r = row_index(p, info.row);
      float* lse = p.lse + ((int64_t(r.b) * p.S + r.s) * p.G + r.g) * p.h;
#pragma unroll
      for (int i = 0; i < 2 * kUnits; ++i) {
        const int head = (first_unit + i / 2) * 8 + 2 * t + i % 2;
        if (head < p.h) dev::store(lse + head, natural_lse(state.max[i], state.sum[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kUnits; ++i) state.sum[i] = inverse_sum(state.sum[i]);
  }

  // The ends of an item, in consumer_output.cuh.
  __device__ __forceinline__ void write_row(int row, float out_scale) const;
  // Where a split's unnormalised O and its (max, sum) go, FP32: the workspace or, in a cluster, this block's shared
  // memory.
  struct Partial {
    float* o;         // [h][head_stride]
    float* ml;        // [h][2]
    int head_stride;  // floats
  };
  __device__ __forceinline__ Partial partial_of(const SegmentInfo& info) const;
  __device__ __forceinline__ void write_partial(const Partial& part, float out_scale) const;
  __device__ __forceinline__ void finish_item(const SegmentInfo& info, float out_scale);
  __device__ __forceinline__ void write_empty(const SegmentInfo& info) const;

  __device__ __forceinline__ void run() {
    for (;;) {
      dev::mbarrier_wait(smem.map_full + segment.slot * Traits::kTilesK, segment.phase);
      const SegmentInfo info = dev::load(&smem.segments[segment.slot].info);
      if (info.tokens < 0) break;
      const bool first = info.flags & kFirstSegment, last = info.flags & kLastSegment;
      if (info.tokens == 0) {
        write_empty(info);
      } else {
        if (first) begin_item();
        compute_logits(info.tokens);
        if (!Traits::kQInRegisters && last) arrive(smem.q_empty);  // Q was read before the last K slot's __syncwarp
        update_max(info.tokens, first);
        store_probabilities(info.tokens);
        if (last) finish_sums(info);
        accumulate_values(info.tokens);
      }
      float out_scale = 1.0f;
      if constexpr (Traits::kFloat8) {
        if (last) out_scale = dev::load(&smem.row_scales[segment.slot].out) * value_scale.largest();
      }
      __syncwarp();
      arrive(smem.map_empty + segment.slot);
      segment.advance(kMapSlots);
      if (last && info.tokens > 0) finish_item(info, out_scale);
    }
  }
};

}  // namespace nsa_sel::consumer

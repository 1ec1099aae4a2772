// consumer.cuh - the four warps that compute: logits of a segment in registers, exact max, probabilities, O += P V.
//
// Tokens are the M side of every MMA and heads the N side, in units of 8: S^T = K Q^T and O^T = V^T P^T. A thread of a
// fragment always holds the same heads (2t and 2t+1 of each unit, t = lane % 4), so max, sum and rescaling stay in
// registers; only the max over other warps' tokens and P itself go through shared memory.
#pragma once
#include "softmax_state.cuh"
#include "traits.cuh"

namespace nsa_sel::consumer {

constexpr int kClusterBarrier = 3;  // 1 and 2 are the groups of head warps

template <class Traits>
struct Consumer {
  using T = typename Traits::T;
  static constexpr int kUnits = Traits::kUnits, kRowsK = Traits::kRowsK, kRowsV = Traits::kRowsV;
  static constexpr int kGroupThreads = 32 * Traits::kTokenWarps;  // the warps that share a set of heads

  const DecodeParams& p;
  const SharedViews<Traits>& smem;
  const int lane, g, t;  // g = lane / 4: token or column in a fragment; t = lane % 4: pair of heads
  const int head_warp, token_warp;
  const int first_unit;  // of this warp's heads
  const int row_units;   // units of 8 heads that the row has
  RingCursor slot, segment;
  uint32_t q_phase = 0;

  uint32_t q_fragments[Traits::kQInRegisters ? Traits::kDk / 32 : 1][kUnits][4];
  float logits[Traits::kTilesK][Traits::kSubTiles][kUnits][4];
  float o[Traits::kColumnTiles][kUnits][4];
  SoftmaxState<2 * kUnits> state;

  __device__ __forceinline__ Consumer(const DecodeParams& params, const SharedViews<Traits>& views, int warp)
      : p(params),
        smem(views),
        lane(int(threadIdx.x) & 31),
        g(lane >> 2),
        t(lane & 3),
        head_warp(warp / Traits::kTokenWarps),
        token_warp(warp % Traits::kTokenWarps),
        first_unit(head_warp * Traits::kUnits),
        row_units(units_of(params.h)) {}

  // Units beyond the row's heads are skipped, not padded: the test is the same for all lanes.
  __device__ __forceinline__ bool has_unit(int u) const { return first_unit + u < row_units; }

  // Arrivals below are by lane 0 behind a __syncwarp: it orders every lane's reads before the slot is given back.
  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    if (lane == 0) dev::mbarrier_arrive(barrier);
  }

  // Four 8x8 matrices of Q: unit u's heads by 32 columns from chunk 4 j.
  __device__ __forceinline__ void load_q_fragment(uint32_t (&r)[4], int u, int j) const {
    const unsigned char* q = reinterpret_cast<const unsigned char*>(smem.q) + (first_unit + u) * 8 * 128;
    dev::ldmatrix_x4(r, q + slab_offset(8 * row_units, lane & 7, 4 * j + (lane >> 3)));
  }

  __device__ __forceinline__ void begin_item() {
    state.init();
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
          if (has_unit(u)) load_q_fragment(q_fragments[j][u], u, j);
      __syncwarp();
      arrive(smem.q_empty);
    }
  }

  // One m16 tile of K against all heads of the warp.
  __device__ __forceinline__ void multiply_keys(const unsigned char* tile, int row0, float (&acc)[kUnits][4]) {
    constexpr int kSets = Traits::kAccumulatorSets;
    float sums[kSets][kUnits][4] = {};
#pragma unroll
    for (int j = 0; j < Traits::kDk / 32; ++j) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        dev::ldmatrix_x4(
            a[i], tile + tile_offset<Traits, Traits::kDk, kRowsK>(row0 + (lane & 15), 4 * j + 2 * i + (lane >> 4)));
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (!has_unit(u)) continue;
        uint32_t b[4];
        if constexpr (Traits::kQInRegisters) {
#pragma unroll
          for (int e = 0; e < 4; ++e) b[e] = q_fragments[j][u][e];
        } else {
          load_q_fragment(b, u, j);
        }
        dev::mma_m16n8k16<T>(sums[0][u], a[0], b[0], b[1]);
        dev::mma_m16n8k16<T>(sums[kSets - 1][u], a[1], b[2], b[3]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[u][e] = kSets == 1 ? sums[0][u][e] : sums[0][u][e] + sums[kSets - 1][u][e];
  }

  __device__ __forceinline__ bool selected(int position, int tokens) const {
    return position < tokens && dev::load(smem.map_k(segment.slot) + position) != kNoRow;
  }

  // Pass 1: base-2 logits of the whole segment into registers; tokens that do not exist are -inf.
  __device__ __forceinline__ void compute_logits(int tokens) {
#pragma unroll
    for (int kt = 0; kt < Traits::kTilesK; ++kt) {
      if (kt * kRowsK >= tokens) break;
      dev::mbarrier_wait(smem.slot_full + slot.slot, slot.phase);
      const unsigned char* tile = smem.slots + slot.slot * Traits::kTile.slot_bytes;
#pragma unroll
      for (int sub = 0; sub < Traits::kSubTiles; ++sub) {
        const int row0 = (sub * Traits::kTokenWarps + token_warp) * 16;
        if (kt * kRowsK + row0 < tokens) multiply_keys(tile, row0, logits[kt][sub]);
      }
      __syncwarp();
      arrive(smem.slot_empty + slot.slot);
      slot.advance(p.smem.num_slots);
#pragma unroll
      for (int sub = 0; sub < Traits::kSubTiles; ++sub) {
        const int position = kt * kRowsK + (sub * Traits::kTokenWarps + token_warp) * 16 + g;
        const bool low = selected(position, tokens), high = selected(position + 8, tokens);
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = logits[kt][sub][u][e];
            x = (e < 2 ? low : high) ? x * p.scale_log2 : -INFINITY;
          }
      }
    }
  }

  // The exact max of the segment over all tokens, folded into the state; O is brought to the new max.
  __device__ __forceinline__ void update_max(int tokens, bool first_segment) {
    const int heads = 8 * row_units;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) continue;
      float2 local{-INFINITY, -INFINITY};
#pragma unroll
      for (int kt = 0; kt < Traits::kTilesK; ++kt)
#pragma unroll
        for (int sub = 0; sub < Traits::kSubTiles; ++sub) {
          if (kt * kRowsK + (sub * Traits::kTokenWarps + token_warp) * 16 >= tokens) continue;
          const float (&x)[4] = logits[kt][sub][u];
          local.x = fmaxf(local.x, fmaxf(x[0], x[2]));
          local.y = fmaxf(local.y, fmaxf(x[1], x[3]));
        }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {  // over the tokens of the fragment
        local.x = fmaxf(local.x, __shfl_xor_sync(0xffffffffu, local.x, step));
        local.y = fmaxf(local.y, __shfl_xor_sync(0xffffffffu, local.y, step));
      }
      if (g == 0) {
        dev::store(reinterpret_cast<float2*>(smem.row_max + token_warp * heads + (first_unit + u) * 8 + 2 * t), local);
      }
    }
    dev::named_barrier_sync(1 + head_warp, kGroupThreads);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) continue;
      float2 all{-INFINITY, -INFINITY};
#pragma unroll
      for (int w = 0; w < Traits::kTokenWarps; ++w) {
        const float2 other =
            dev::load(reinterpret_cast<const float2*>(smem.row_max + w * heads + (first_unit + u) * 8 + 2 * t));
        all.x = fmaxf(all.x, other.x);
        all.y = fmaxf(all.y, other.y);
      }
      const float factor[2] = {state.raise(2 * u, all.x), state.raise(2 * u + 1, all.y)};
      if (first_segment) continue;  // O is zero
#pragma unroll
      for (int c = 0; c < Traits::kColumnTiles; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][u][e] *= factor[e & 1];
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
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          if (!has_unit(u)) continue;
          float weights[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            weights[e] = state.weight(2 * u + (e & 1), logits[kt][sub][u][e]);
            state.sum[2 * u + (e & 1)] += weights[e];
          }
          uint32_t* row =
              reinterpret_cast<uint32_t*>(smem.p + ((first_unit + u) * Traits::kSegment + position + g) * 8) + t;
          dev::store(row, dev::pack2<T>(weights[0], weights[1]));
          dev::store(row + 8 * 4, dev::pack2<T>(weights[2], weights[3]));
        }
      }
    dev::named_barrier_sync(1 + head_warp, kGroupThreads);
  }

  // 16 tokens of V against their probabilities: every warp of the group owns kDv / kTokenWarps columns.
  __device__ __forceinline__ void multiply_values(const unsigned char* tile, int row0, int position) {
    uint32_t b[kUnits][2];
#pragma unroll
    for (int pair = 0; pair < kUnits; pair += 2) {
      if (!has_unit(pair)) continue;
      const int unit = min(first_unit + pair + (lane >> 4), row_units - 1);
      uint32_t r[4];
      dev::ldmatrix_x4_trans(r, smem.p + (unit * Traits::kSegment + position + (lane & 15)) * 8);
      b[pair][0] = r[0], b[pair][1] = r[1], b[pair + 1][0] = r[2], b[pair + 1][1] = r[3];
    }
#pragma unroll
    for (int c = 0; c < Traits::kColumnTiles; ++c) {
      const int chunk = (token_warp * Traits::kColumnTiles + c) * 2 + ((lane >> 3) & 1);
      uint32_t a[4];
      dev::ldmatrix_x4_trans(
          a, tile + tile_offset<Traits, Traits::kDv, kRowsV>(row0 + (lane >> 4) * 8 + (lane & 7), chunk));
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (has_unit(u)) dev::mma_m16n8k16<T>(o[c][u], a, b[u][0], b[u][1]);
      }
    }
  }

  // Pass 2.
  __device__ __forceinline__ void accumulate_values(int tokens) {
    for (int first = 0; first < tokens; first += kRowsV) {
      dev::mbarrier_wait(smem.slot_full + slot.slot, slot.phase);
      const unsigned char* tile = smem.slots + slot.slot * Traits::kTile.slot_bytes;
#pragma unroll
      for (int row0 = 0; row0 < kRowsV; row0 += 16) {
        if (first + row0 < tokens) multiply_values(tile, row0, first + row0);
      }
      __syncwarp();
      arrive(smem.slot_empty + slot.slot);
      slot.advance(p.smem.num_slots);
    }
  }

  // Adds up the threads' shares of each head's sum.
  __device__ __forceinline__ void reduce_sums() {
    const int heads = 8 * row_units;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) continue;
      float2 sum{state.sum[2 * u], state.sum[2 * u + 1]};
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step);
        sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
      }
      if (g == 0) {
        dev::store(reinterpret_cast<float2*>(smem.row_sum + token_warp * heads + (first_unit + u) * 8 + 2 * t), sum);
      }
    }
    dev::named_barrier_sync(1 + head_warp, kGroupThreads);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) continue;
      float2 sum{0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < Traits::kTokenWarps; ++w) {  // always in this order: two runs give the same bits
        const float2 other =
            dev::load(reinterpret_cast<const float2*>(smem.row_sum + w * heads + (first_unit + u) * 8 + 2 * t));
        sum.x += other.x;
        sum.y += other.y;
      }
      state.sum[2 * u] = sum.x;
      state.sum[2 * u + 1] = sum.y;
    }
  }

  // Whole rows: normalise, transpose 8x8 blocks in registers so that a head's columns are neighbours, write once.
  __device__ __forceinline__ void write_row(int row) const {
    const RowIndex r = row_index(row, p.S, p.G);
    T* out = static_cast<T*>(p.out) + r.b * p.out_stride_b + r.s * p.out_stride_s + r.g * p.out_stride_g;
    const int64_t lse_row = (int64_t(r.b) * p.S + r.s) * p.G + r.g;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) continue;
      const int unit = first_unit + u;
      const float scale[2] = {inverse_sum(state.sum[2 * u]), inverse_sum(state.sum[2 * u + 1])};
#pragma unroll
      for (int c = 0; c < Traits::kColumnTiles; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t column = dev::pack2<T>(o[c][u][2 * half] * scale[0], o[c][u][2 * half + 1] * scale[1]);
          const uint32_t pair = dev::movmatrix_trans(column);  // now head g, columns 2t and 2t + 1
          const int head = unit * 8 + g;
          const int d = (token_warp * Traits::kColumnTiles + c) * 16 + half * 8 + 2 * t;
          if (head < p.h) dev::store(reinterpret_cast<uint32_t*>(out + head * p.out_stride_h + d), pair);
        }
      }
      if (p.lse != nullptr && token_warp == 0 && g == 0) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int head = unit * 8 + 2 * t + e;
          if (head < p.h) {
            dev::store(p.lse + lse_row * p.h + head, natural_lse(state.max[2 * u + e], state.sum[2 * u + e]));
          }
        }
      }
    }
  }

  // Where a split's unnormalised O and its (max, sum) go, FP32: the workspace or, in a cluster, this block's shared
  // memory.
  struct Partial {
    float* o;         // [h][head_stride]
    float* ml;        // [h][2]
    int head_stride;  // floats
  };
  __device__ __forceinline__ Partial partial_of(const SegmentInfo& info) const {
    if (p.cluster) {
      const ClusterPartial<Traits> own(smem, p.h);
      return {own.o, own.ml, own.kHeadStride};
    }
    const int64_t part = int64_t(info.row - p.full_rows) * p.num_splits + info.split;
    return {p.partial_o + part * p.h * Traits::kDv, p.partial_ml + part * p.h * 2, Traits::kDv};
  }

  __device__ __forceinline__ void write_partial(const Partial& part) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!has_unit(u)) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int head = (first_unit + u) * 8 + 2 * t + e;
        if (head >= p.h) continue;
        if (token_warp == 0 && g == 0) {
          dev::store(reinterpret_cast<float2*>(part.ml + head * 2), float2{state.max[2 * u + e], state.sum[2 * u + e]});
        }
#pragma unroll
        for (int c = 0; c < Traits::kColumnTiles; ++c)
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // 8 lanes of one head write one 32-byte sector
            const int d = (token_warp * Traits::kColumnTiles + c) * 16 + half * 8 + g;
            dev::store(part.o + head * part.head_stride + d, o[c][u][2 * half + e]);
          }
      }
    }
  }

  __device__ __forceinline__ void finish_item(const SegmentInfo& info) {
    reduce_sums();
    if (info.split < 0) {
      write_row(info.row);
      return;
    }
    // A cluster's partial takes the place of the ring: every warp must have finished with its V tiles.
    if (p.cluster) dev::named_barrier_sync(kClusterBarrier, 32 * kConsumerWarps);
    write_partial(partial_of(info));
  }

  // Nothing selected: zeros and lse -inf, or an empty partial, whose O nobody reads.
  __device__ __forceinline__ void write_empty(const SegmentInfo& info) const {
    const int thread = int(threadIdx.x);  // [0, 32 * kConsumerWarps)
    if (info.split >= 0) {
      const Partial part = partial_of(info);
      if (thread < p.h) dev::store(reinterpret_cast<float2*>(part.ml + thread * 2), float2{-INFINITY, 0.0f});
      return;
    }
    const RowIndex r = row_index(info.row, p.S, p.G);
    T* out = static_cast<T*>(p.out) + r.b * p.out_stride_b + r.s * p.out_stride_s + r.g * p.out_stride_g;
    for (int i = thread; i < p.h * (Traits::kDv / 2); i += 32 * kConsumerWarps) {
      const int head = i / (Traits::kDv / 2), d = i % (Traits::kDv / 2) * 2;
      dev::store(reinterpret_cast<uint32_t*>(out + head * p.out_stride_h + d), 0u);
    }
    if (p.lse != nullptr && thread < p.h) {
      dev::store(p.lse + ((int64_t(r.b) * p.S + r.s) * p.G + r.g) * p.h + thread, -INFINITY);
    }
  }

  __device__ __forceinline__ void run() {
    for (;;) {
      dev::mbarrier_wait(smem.map_full + segment.slot, segment.phase);
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
        accumulate_values(info.tokens);
      }
      __syncwarp();
      arrive(smem.map_empty + segment.slot);
      segment.advance(kMapSlots);
      if (last && info.tokens > 0) finish_item(info);
    }
  }
};

}  // namespace nsa_sel::consumer

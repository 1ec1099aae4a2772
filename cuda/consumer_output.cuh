// consumer_output.cuh - the ends of an item: a whole row's out, a split's partial, and what an empty one leaves.
#pragma once
#include "consumer.cuh"

namespace nsa_sel::consumer {

// Whole rows, `state.sum` inverse: normalise, transpose 8x8 blocks in registers so that a head's columns are
// neighbours, write once.
template <class Traits>
__device__ __forceinline__ void Consumer<Traits>::write_row(int row, float out_scale) const {
  const auto [thread, g, t, token_warp] = place();
  const RowIndex r = row_index(p, row);
  T* out = static_cast<T*>(p.out) + uint32_t(r.b) * p.out_stride_b + uint32_t(r.s) * p.out_stride_s +
           uint32_t(r.g) * p.out_stride_g;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (!has_unit(u)) continue;
    const int unit = first_unit + u;
    const float scale[2] = {state.sum[2 * u] * out_scale, state.sum[2 * u + 1] * out_scale};
#pragma unroll
    for (int c = 0; c < Traits::kColumnTiles; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int tile = (token_warp * Traits::kColumnTiles + c) * 16;
        const float (&x)[4] = o[c][u];
        uint32_t pair;
        int head, d;
        if constexpr (Traits::kFloat8) {
          pair = dev::pack2<T>(x[half] * scale[half], x[half + 2] * scale[half]);  // neighbours already
          head = unit * 8 + 2 * t + half, d = tile + 2 * g;
        } else {
          const uint32_t column = dev::pack2<T>(x[2 * half] * scale[0], x[2 * half + 1] * scale[1]);
          pair = dev::movmatrix_trans(column);  // now head g, columns 2t and 2t + 1
          head = unit * 8 + g, d = tile + half * 8 + 2 * t;
        }
        if (head < p.h) dev::store(reinterpret_cast<uint32_t*>(out + uint32_t(head) * p.out_stride_h + d), pair);
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ typename Consumer<Traits>::Partial Consumer<Traits>::partial_of(
    const SegmentInfo& info) const {
  if (p.cluster) {
    const ClusterPartial<Traits> own(smem, p.h);
    return {own.o, own.ml, own.kHeadStride};
  }
  const int64_t part = int64_t(info.row - p.full_rows) * p.num_splits + info.split;
  return {p.partial_o + part * p.h * Traits::kDv, p.partial_ml + part * p.h * 2, Traits::kDv};
}

template <class Traits>
__device__ __forceinline__ void Consumer<Traits>::write_partial(const Partial& part, float out_scale) const {
  const auto [thread, g, t, token_warp] = place();
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
      for (int c = 0; c < Traits::kColumnTiles; ++c) {  // 8 lanes of one head write whole 32-byte sectors
        float* to = part.o + head * part.head_stride + (token_warp * Traits::kColumnTiles + c) * 16;
        if constexpr (Traits::kFloat8) {
          dev::store(reinterpret_cast<float2*>(to + 2 * g), float2{o[c][u][e] * out_scale, o[c][u][e + 2] * out_scale});
        } else {
          dev::store(to + g, o[c][u][e]);
          dev::store(to + 8 + g, o[c][u][2 + e]);
        }
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ void Consumer<Traits>::finish_item(const SegmentInfo& info, float out_scale) {
  if (info.split < 0) {
    write_row(info.row, out_scale);
    return;
  }
  // A cluster's partial takes the place of the ring: every warp must have finished with its V tiles.
  if (p.cluster) dev::named_barrier_sync(kConsumerBarrier, 32 * kConsumerWarps);
  write_partial(partial_of(info), out_scale);
}

// Nothing selected: zeros and lse -inf, or an empty partial.
template <class Traits>
__device__ __forceinline__ void Consumer<Traits>::write_empty(const SegmentInfo& info) const {
  const int thread = place().thread;  // [0, 32 * kConsumerWarps)
  if (info.split >= 0) {
    const Partial part = partial_of(info);
    if (thread < p.h) dev::store(reinterpret_cast<float2*>(part.ml + thread * 2), float2{-INFINITY, 0.0f});
#pragma unroll 1
    for (int i = thread; i < p.h * (Traits::kDv / 4); i += 32 * kConsumerWarps) {  // read with the others
      const int head = i / (Traits::kDv / 4), d = i % (Traits::kDv / 4) * 4;
      dev::store(reinterpret_cast<float4*>(part.o + head * part.head_stride + d), float4{0.0f, 0.0f, 0.0f, 0.0f});
    }
    return;
  }
  const RowIndex r = row_index(p, info.row);
  T* out = static_cast<T*>(p.out) + uint32_t(r.b) * p.out_stride_b + uint32_t(r.s) * p.out_stride_s +
           uint32_t(r.g) * p.out_stride_g;
  for (int i = thread; i < p.h * (Traits::kDv / 2); i += 32 * kConsumerWarps) {
    const int head = i / (Traits::kDv / 2), d = i % (Traits::kDv / 2) * 2;
    dev::store(reinterpret_cast<uint32_t*>(out + uint32_t(head) * p.out_stride_h + d), 0u);
  }
  if (p.lse != nullptr && thread < p.h) {
    dev::store(p.lse + ((int64_t(r.b) * p.S + r.s) * p.G + r.g) * p.h + thread, -INFINITY);
  }
}

}  // namespace nsa_sel::consumer

// merge.cuh - brings the partials of a split row together, always in split order, and writes the row. Used by the
// combine kernel (partials in global memory) and by clusters (partials in the shared memory of their blocks).
#pragma once
#include "softmax_state.cuh"
#include "traits.cuh"

namespace nsa_sel {

// Four neighbouring columns of one head. `state_of(split)` gives its (max, sum), `o_of(split)` its unnormalised
// columns.
template <class T, class Params, class StateOf, class OOf>
__device__ __forceinline__ void merge_quad(const Params& p, int num_splits, int row, int head, int d,
                                           const StateOf& state_of, const OOf& o_of) {
  float max = -INFINITY;
#pragma unroll 4
  for (int split = 0; split < num_splits; ++split) max = fmaxf(max, state_of(split).x);
  const float base = softmax_base(max);
  float sum = 0.0f;
  float4 acc{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int split = 0; split < num_splits; ++split) {
    const float2 state = state_of(split);
    // A split without tokens wrote no O. The sum tells, not the max: where every logit is NaN the max is -inf as well,
    // and the NaN has to come through.
    const bool wrote = state.y != 0.0f;
    const float4 o = wrote ? o_of(split) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    const float weight = wrote ? dev::exp2_approx(state.x - base) : 0.0f;
    sum += weight * state.y;
    acc.x += weight * o.x;
    acc.y += weight * o.y;
    acc.z += weight * o.z;
    acc.w += weight * o.w;
  }

  const RowIndex r = row_index(row, p.S, p.G);
  const float scale = inverse_sum(sum);
  T* out = static_cast<T*>(p.out) + r.b * p.out_stride_b + r.s * p.out_stride_s + r.g * p.out_stride_g +
           head * p.out_stride_h + d;
  dev::store(reinterpret_cast<uint2*>(out),
             uint2{dev::pack2<T>(acc.x * scale, acc.y * scale), dev::pack2<T>(acc.z * scale, acc.w * scale)});
  if (p.lse != nullptr && d == 0) {
    dev::store(p.lse + ((int64_t(r.b) * p.S + r.s) * p.G + r.g) * p.h + head, natural_lse(max, sum));
  }
}

}  // namespace nsa_sel

// merge.cuh - brings the partials of a split row together, always in split order, and writes the row. Used by the
// combine kernel (partials in global memory) and by clusters (partials in the shared memory of their blocks).
#pragma once
#include "softmax_state.cuh"
#include "traits.cuh"

namespace nsa_sel {

// Partials asked for at once: one trip to memory for up to eight splits.
constexpr int kMergeBatch = 8;

// Four neighbouring columns of one head. `state_of(split)` gives its (max, sum), `o_of(split)` its unnormalised
// columns, zeros where the split has no tokens. No load waits for another: all of a batch are asked for first, in a
// batch with fewer splits the last one several times.
template <class T, class Params, class StateOf, class OOf>
__device__ __forceinline__ void merge_quad(const Params& p, int num_splits, int row, int head, int d,
                                           const StateOf& state_of, const OOf& o_of) {
  float max = -INFINITY, sum = 0.0f;
  float4 acc{0.0f, 0.0f, 0.0f, 0.0f};
  for (int first = 0; first < num_splits; first += kMergeBatch) {
    float2 state[kMergeBatch];
    float4 o[kMergeBatch];
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) state[i] = state_of(min(first + i, num_splits - 1));
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) o[i] = o_of(min(first + i, num_splits - 1));
    float raised = max;
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) raised = fmaxf(raised, state[i].x);
    const float base = softmax_base(raised), factor = dev::exp2_approx(max - base);
    if (first > 0) {
      sum *= factor;
      acc = {acc.x * factor, acc.y * factor, acc.z * factor, acc.w * factor};
    }
    max = raised;
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) {
      // The sum tells an empty split, not the max: where every logit is NaN the max is -inf as well, and the NaN has to
      // come through.
      const bool counts = first + i < num_splits && state[i].y != 0.0f;
      const float weight = counts ? dev::exp2_approx(state[i].x - base) : 0.0f;
      if (!counts) continue;
      sum += weight * state[i].y;
      acc.x += weight * o[i].x;
      acc.y += weight * o[i].y;
      acc.z += weight * o[i].z;
      acc.w += weight * o[i].w;
    }
  }

  const RowIndex r = row_index(p, row);
  const float scale = inverse_sum(sum);
  T* out = static_cast<T*>(p.out) + uint32_t(r.b) * p.out_stride_b + uint32_t(r.s) * p.out_stride_s +
           uint32_t(r.g) * p.out_stride_g + uint32_t(head) * p.out_stride_h + d;
  dev::store(reinterpret_cast<uint2*>(out),
             uint2{dev::pack2<T>(acc.x * scale, acc.y * scale), dev::pack2<T>(acc.z * scale, acc.w * scale)});
  if (p.lse != nullptr && d == 0) {
    dev::store(p.lse + ((int64_t(r.b) * p.S + r.s) * p.G + r.g) * p.h + head, natural_lse(max, sum));
  }
}

}  // namespace nsa_sel

// softmax_state.cuh - the running (max, sum) of a row's heads, in base 2 and FP32.
#pragma once
#include "primitives.cuh"

namespace nsa_sel {

// State of N heads in registers of one thread. The sum is the thread's own share until the epilogue adds the shares up.
template <int N>
struct SoftmaxState {
  float max[N];
  float sum[N];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.0f;
    }
  }

  // Raises head i's max and returns the factor that brings what was summed under the old one to the new one.
  __device__ __forceinline__ float raise(int i, float new_max) {
    const float raised = fmaxf(max[i], new_max);
    // Nothing seen yet on both sides: (-inf) - (-inf) is NaN, and so would be every later sum.
    const float factor = raised == -INFINITY ? 1.0f : dev::exp2_approx(max[i] - raised);
    max[i] = raised;
    sum[i] *= factor;
    return factor;
  }

  // exp2(logit - max), 0 for a masked logit; a row of masked logits has max -inf and must give 0, not NaN.
  __device__ __forceinline__ float weight(int i, float logit) const {
    return dev::exp2_approx(logit - (max[i] == -INFINITY ? 0.0f : max[i]));
  }
};

// 1 / sum, and 0 where nothing was selected, so that such a row's output is exactly 0.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// Natural-log-sum-exp from a base-2 max and a sum; -inf where nothing was selected.
__device__ __forceinline__ float natural_lse(float max, float sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  return sum == 0.0f ? -INFINITY : (max + log2f(sum)) * kLn2;
}

}  // namespace nsa_sel

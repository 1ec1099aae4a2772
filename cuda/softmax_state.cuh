// softmax_state.cuh - the running (max, sum) of a row's heads, in base 2 and FP32.
#pragma once
#include "primitives.cuh"

namespace nsa_sel {

// What logits of a head are taken relative to. An infinite max is no base: (-inf) - (-inf) and inf - inf are NaN, while
// exp2(-inf - 0) is the 0 of a row without tokens and exp2(inf - 0) the infinity that log-sum-exp gives.
__device__ __forceinline__ float softmax_base(float max) { return fabsf(max) == INFINITY ? 0.0f : max; }

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
    const float factor = dev::exp2_approx(max[i] - softmax_base(raised));
    max[i] = raised;
    sum[i] *= factor;
    return factor;
  }

  // exp2(logit - max), 0 for a masked logit.
  __device__ __forceinline__ float weight(int i, float logit) const {
    return dev::exp2_approx(logit - softmax_base(max[i]));
  }
};

// With FP16, what a row's probabilities times V's factors are taken relative to: the largest factor so far, so that the
// products use the format's range. A factor of 0.001 would leave an even share of 4,096 tokens a subnormal number.
template <bool kUsed_>
struct ValueScale {
  static constexpr bool kUsed = false;
  __device__ __forceinline__ void init(bool) {}
  __device__ __forceinline__ float inverse() const { return 1.0f; }
  __device__ __forceinline__ float largest() const { return 1.0f; }
};
template <>
struct ValueScale<true> {
  static constexpr bool kUsed = true;
  float top;
  // Not 0 at first, which has no inverse.
  __device__ __forceinline__ void init(bool per_token) { top = per_token ? 1e-36f : 1.0f; }
  // Returns the factor that brings what was summed up before to the new one.
  __device__ __forceinline__ float raise(float largest) {
    const float raised = fmaxf(top, largest), factor = top * (1.0f / raised);
    top = raised;
    return factor;
  }
  __device__ __forceinline__ float inverse() const { return 1.0f / top; }
  __device__ __forceinline__ float largest() const { return top; }
};

// 1 / sum, and 0 where nothing was selected, so that such a row's output is exactly 0.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// Natural-log-sum-exp from a base-2 max and a sum; -inf where nothing was selected.
__device__ __forceinline__ float natural_lse(float max, float sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  return sum == 0.0f ? -INFINITY : (softmax_base(max) + log2f(sum)) * kLn2;
}

}  // namespace nsa_sel

// combine_kernel.cuh - the second kernel of a split launch: merges the partials in the workspace.
#pragma once
#include "../cpp/params.h"
#include "merge.cuh"

namespace nsa_sel {

// A thread owns four neighbouring columns of one head; blockIdx.x = split row * chunks + chunk.
template <class T>
__device__ __forceinline__ void combine_kernel(const CombineParams& p) {
  const int split_row = divide(int(blockIdx.x), p.by_chunks);
  const int quad = (int(blockIdx.x) - split_row * p.chunks) * kCombineThreads + int(threadIdx.x);
  const int head = divide(quad, p.by_columns), d = quad * 4 - head * p.Dv;
  if (head >= p.h) return;
  const int64_t first_part = int64_t(split_row) * p.num_splits * p.h + head;  // parts of one head are h apart

  dev::grid_dependency_wait();
  merge_quad<T>(
      p, p.num_splits, p.first_row + split_row, head, d,
      [&](int split) {
        return dev::load(reinterpret_cast<const float2*>(p.partial_ml + (first_part + int64_t(split) * p.h) * 2));
      },
      [&](int split) {
        return dev::load(reinterpret_cast<const float4*>(p.partial_o + (first_part + int64_t(split) * p.h) * p.Dv + d));
      });
}

}  // namespace nsa_sel

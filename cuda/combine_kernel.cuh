// combine_kernel.cuh - the second kernel of a split launch: merges the partials in the workspace.
#pragma once
#include "../cpp/params.h"
#include "merge.cuh"

namespace nsa_sel {

// A thread owns four neighbouring columns of one head; blockIdx.x = split row * chunks + chunk.
template <class T>
__device__ __forceinline__ void combine_kernel(const CombineParams& p) {
  const int quads = p.h * p.Dv / 4;
  const int chunks = (quads + kCombineThreads - 1) / kCombineThreads;
  const int split_row = int(blockIdx.x) / chunks;
  const int quad = (int(blockIdx.x) - split_row * chunks) * kCombineThreads + int(threadIdx.x);
  if (quad >= quads) return;
  const int head = quad / (p.Dv / 4), d = quad % (p.Dv / 4) * 4;
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

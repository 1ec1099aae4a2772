// launch.cuh - defines the functions behind one DecodeInstance; included by the files in instances/ only.
#pragma once
#include "decode_kernel.cuh"
#include "launch.h"
#include "runtime.cuh"

namespace nsa_sel {

template <Dtype kDtype>
struct ElementOf;
template <>
struct ElementOf<Dtype::kFloat16> {
  using type = __half;
};
template <>
struct ElementOf<Dtype::kBfloat16> {
  using type = __nv_bfloat16;
};

template <Dtype kDtype, int kDk, int kDv, int kHeadTile, Loads kLoads>
int launch_decode(const DecodeParams& params, int grid, int cluster, void* stream) {
  using Traits = DecodeTraits<typename ElementOf<kDtype>::type, kDk, kDv, kHeadTile, kLoads>;
  const dev::LaunchShape shape{unsigned(grid), Traits::kThreads, params.smem.total, unsigned(cluster), false};
  const int error = dev::configure_kernel<decode_kernel<Traits>>();
  return error != 0 ? error : dev::launch_kernel(decode_kernel<Traits>, shape, params, stream);
}

// One line in instances/ per compiled kernel.
#define NSA_SEL_INSTANTIATE_DECODE(dtype, Dk, Dv, head_tile, loads) \
  template int launch_decode<Dtype::dtype, Dk, Dv, head_tile, Loads::loads>(const DecodeParams&, int grid, int, void*);

}  // namespace nsa_sel

#include "../combine_kernel.cuh"
#include "../launch.h"
#include "../runtime.cuh"

namespace nsa_sel {

int launch_combine(Dtype dtype, const CombineParams& params, bool programmatic, void* stream) {
  const int chunks = (params.h * params.Dv / 4 + kCombineThreads - 1) / kCombineThreads;
  const int error = dtype == Dtype::kBfloat16 ? dev::configure_kernel<combine_kernel<__nv_bfloat16>>()
                                              : dev::configure_kernel<combine_kernel<__half>>();
  if (error != 0) return error;
  const dev::LaunchShape shape{unsigned(params.split_rows * chunks), kCombineThreads, 0, 1, programmatic};
  if (dtype == Dtype::kBfloat16) return dev::launch_kernel(combine_kernel<__nv_bfloat16>, shape, params, stream);
  return dev::launch_kernel(combine_kernel<__half>, shape, params, stream);
}

int code_capability(int* out) { return dev::code_capability(combine_kernel<__half>, out); }

}  // namespace nsa_sel

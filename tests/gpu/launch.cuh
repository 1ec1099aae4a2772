// launch.cuh - launches a probe: by the CUDA runtime on a GPU, by the emulator on the host.
#pragma once

namespace nsa_sel::dev {

struct LaunchShape {
  unsigned grid;
  unsigned block;
  unsigned smem_bytes;
  unsigned cluster = 1;       // blocks per cluster (sm_90)
  bool programmatic = false;  // may start before the previous grid of the stream has ended (sm_90)
};

}  // namespace nsa_sel::dev

#if defined(NSA_SEL_HOST_RUN)
#include "host_runtime.h"
#else

#include <cuda_runtime.h>

namespace nsa_sel::dev {

// Returns 0 or a cudaError_t; the error state is cleared, so that a refused launch does not taint the next call.
template <class Params>
int launch_kernel(void (*kernel)(Params), const LaunchShape& shape, const Params& params, void* stream) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid);
  config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = shape.smem_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {shape.cluster, 1, 1};
    ++config.numAttrs;
  }
  if (shape.programmatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (error != cudaSuccess) cudaGetLastError();
  return int(error);
}

}  // namespace nsa_sel::dev

#endif  // NSA_SEL_HOST_RUN

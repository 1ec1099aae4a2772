// runtime.cuh - the calls into the CUDA runtime that a launch needs; the host run replaces this file's second half.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nsa_sel::dev {

struct LaunchShape {
  unsigned grid;
  unsigned block;
  unsigned smem_bytes;
  unsigned cluster = 1;       // blocks per cluster (sm_90)
  bool programmatic = false;  // may start before the previous grid of the stream has ended (sm_90)
};

using Stream = void*;  // cudaStream_t

}  // namespace nsa_sel::dev

#if defined(NSA_SEL_HOST_RUN)
#include "host_runtime.h"
#else

#include <cuda_runtime.h>

#include <atomic>

namespace nsa_sel::dev {

// Once per kernel and device: all the shared memory that a block may ask for, and an L1 that leaves room for two
// blocks.
template <auto kKernel>
int configure_kernel() {
  static std::atomic<uint64_t> done{0};  // a bit per device; a race configures twice, which is harmless
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (error == cudaSuccess && device < 64 && (done.load(std::memory_order_acquire) & bit) != 0) return 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  if (error != cudaSuccess) cudaGetLastError();
  return int(error);
}

// Returns 0 or a cudaError_t; the error state is cleared, so that a refused launch does not taint the next call.
template <class Params>
int launch_kernel(void (*kernel)(Params), const LaunchShape& shape, const Params& params, Stream stream) {
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

template <class Params>
int code_capability(void (*kernel)(Params), int* out) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) cudaGetLastError();
  *out = attributes.ptxVersion;
  return int(error);
}

}  // namespace nsa_sel::dev

#endif  // NSA_SEL_HOST_RUN

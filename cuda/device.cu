#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "device.h"
#include "launch.h"

namespace nsa_sel {

DeviceLimits device_limits(int index) {
  DeviceLimits limits{};
  int major = 0, minor = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&limits.sm_count, cudaDevAttrMultiProcessorCount},
                {&major, cudaDevAttrComputeCapabilityMajor},
                {&minor, cudaDevAttrComputeCapabilityMinor},
                {&limits.smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&limits.smem_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor}};
  for (const auto& w : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(w.value, w.attribute, index);
    if (error != cudaSuccess) {
      cudaGetLastError();
      throw std::runtime_error("device " + std::to_string(index) + ": " + error_string(int(error)));
    }
  }
  int previous = 0, code = 0;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(index);
  if (error == cudaSuccess) error = static_cast<cudaError_t>(code_capability(&code));
  if (error == cudaSuccess) error = cudaSetDevice(previous);
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("device " + std::to_string(index) + ": " + error_string(int(error)));
  }
  limits.capability = std::min(10 * major + minor, code);  // see code_capability
  return limits;
}

std::string error_string(int code) {
  const cudaError_t error = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

bool is_refusal(int code) {
  switch (static_cast<cudaError_t>(code)) {
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorSharedObjectInitFailed:
    case cudaErrorInvalidClusterSize:
    case cudaErrorNotSupported:
      return true;
    default:
      return false;
  }
}

}  // namespace nsa_sel

#include <cuda_runtime.h>

#include <stdexcept>

#include "device.h"

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
  limits.capability = 10 * major + minor;
  return limits;
}

std::string error_string(int code) {
  const cudaError_t error = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

bool is_sticky(int code) {
  switch (static_cast<cudaError_t>(code)) {
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorDevicesUnavailable:
      return true;
    default:
      return false;
  }
}

}  // namespace nsa_sel

// api.h - the functions of the NVIDIA driver that this module calls, from libcuda.so.1 once they are first needed.
#pragma once
#include <cuda.h>

#include <stdexcept>
#include <string>

namespace nsa_sel::driver {

// What the driver refused. `bars`: this GPU, driver and build do not go together and nothing else is amiss, so that
// calls may go elsewhere. Anything else (a lost context, a broken capture, a fork) has to be raised.
struct Error : std::runtime_error {
  Error(const std::string& what, bool bars_) : std::runtime_error(what), bars(bars_) {}
  bool bars;
};

#define NSA_SEL_DRIVER_FUNCTIONS(X)    \
  X(cuInit)                            \
  X(cuGetErrorName)                    \
  X(cuGetErrorString)                  \
  X(cuDeviceGet)                       \
  X(cuDeviceGetAttribute)              \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuCtxGetCurrent)                   \
  X(cuCtxPushCurrent)                  \
  X(cuCtxPopCurrent)                   \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuModuleLoadData)                  \
  X(cuModuleGetFunction)               \
  X(cuFuncSetAttribute)                \
  X(cuStreamIsCapturing)               \
  X(cuOccupancyMaxActiveClusters)      \
  X(cuLaunchKernelEx)

struct Api {
  int version;  // newest CUDA that the driver knows, as 12040
#define NSA_SEL_MEMBER(name) decltype(&::name) name;
  NSA_SEL_DRIVER_FUNCTIONS(NSA_SEL_MEMBER)
#undef NSA_SEL_MEMBER
};

// Loads and initialises the driver at the first call. Throws Error, the same one each time, where there is no usable
// one.
const Api& api();

std::string text(CUresult code);  // "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"
// Whether a failure to initialise, to make a context or to load says that GPU, driver and build do not go together.
bool bars(CUresult code);
inline void check(CUresult code, const std::string& what) {
  if (code != CUDA_SUCCESS) throw Error(what + ": " + text(code), bars(code));
}

}  // namespace nsa_sel::driver

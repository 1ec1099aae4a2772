#include "driver/api.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>

namespace nsa_sel::driver {
namespace {

std::atomic<bool> forked{false};  // this process is the child of one that had initialised the driver
constexpr const char* kForked =
    "CUDA was initialised before this process was forked, and cannot be again: start processes by 'spawn' or "
    "'forkserver'";

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What drivers of a CUDA version are called; where "nvidia-smi" shows no CUDA version this is what it shows.
std::string oldest_driver() { return NSA_SEL_OLDEST_CUDA >= 13000 ? "580" : "525"; }

Api load() {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Error(std::string("no NVIDIA driver: ") + dlerror(), true);

  Api api{};
  const auto get_version = reinterpret_cast<decltype(&cuDriverGetVersion)>(dlsym(library, "cuDriverGetVersion"));
  if (get_version == nullptr || get_version(&api.version) != CUDA_SUCCESS) {
    throw Error("the NVIDIA driver (libcuda.so.1) does not tell its version", true);
  }
  if (api.version < NSA_SEL_OLDEST_CUDA) {
    throw Error("expected an NVIDIA driver for CUDA " + version_text(NSA_SEL_OLDEST_CUDA) + " (" + oldest_driver() +
                    ") or newer, got one for CUDA " + version_text(api.version),
                true);
  }
  const auto get = reinterpret_cast<decltype(&cuGetProcAddress)>(dlsym(library, "cuGetProcAddress_v2"));
  const auto find = [&](const char* name) {
    void* function = nullptr;
    // By the interface of the oldest driver, which later ones keep.
    const CUresult code =
        get == nullptr ? CUDA_ERROR_NOT_FOUND : get(name, &function, 12000, CU_GET_PROC_ADDRESS_DEFAULT, nullptr);
    if (code != CUDA_SUCCESS || function == nullptr) {
      throw Error(std::string("the NVIDIA driver (CUDA ") + version_text(api.version) + ") has no " +
                      (get == nullptr ? "cuGetProcAddress" : name),
                  true);
    }
    return function;
  };
#define NSA_SEL_FIND(name) api.name = reinterpret_cast<decltype(api.name)>(find(#name));
  NSA_SEL_DRIVER_FUNCTIONS(NSA_SEL_FIND)
#undef NSA_SEL_FIND
  return api;
}

std::string text_by(const Api& api, CUresult code) {
  const char *name = nullptr, *description = nullptr;
  api.cuGetErrorName(code, &name);
  api.cuGetErrorString(code, &description);
  if (name == nullptr) return "driver error " + std::to_string(int(code));
  return std::string(name) + (description == nullptr ? "" : std::string(": ") + description);
}

struct Loaded {
  Api api{};
  std::unique_ptr<Error> error;
  Loaded() {
    try {
      api = load();
      const CUresult code = api.cuInit(0);
      if (code == CUDA_ERROR_NOT_INITIALIZED) throw Error(kForked, false);  // somebody else's in the parent
      if (code != CUDA_SUCCESS) throw Error("the NVIDIA driver does not start: " + text_by(api, code), true);
      pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
    } catch (const Error& caught) {
      error = std::make_unique<Error>(caught);
    }
  }
};

const Loaded& loaded() {
  static const Loaded once;  // threads that come together wait for the first
  return once;
}

}  // namespace

const Api& api() {
  if (forked.load(std::memory_order_relaxed)) throw Error(kForked, false);
  const Loaded& state = loaded();
  if (state.error != nullptr) throw Error(*state.error);
  return state.api;
}

std::string text(CUresult code) { return text_by(loaded().api, code); }

bool bars(CUresult code) {
  switch (code) {
    case CUDA_ERROR_OUT_OF_MEMORY:
    case CUDA_ERROR_STUB_LIBRARY:
    case CUDA_ERROR_DEVICE_UNAVAILABLE:
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_INVALID_PTX:
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
    case CUDA_ERROR_JIT_COMPILATION_DISABLED:
    case CUDA_ERROR_INVALID_SOURCE:
    case CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND:
    case CUDA_ERROR_SHARED_OBJECT_INIT_FAILED:
    case CUDA_ERROR_NOT_FOUND:
    case CUDA_ERROR_NOT_SUPPORTED:
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
      return true;
    default:
      return false;
  }
}

}  // namespace nsa_sel::driver

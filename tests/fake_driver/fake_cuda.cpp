// fake_cuda.cpp - a libcuda.so.1 without a GPU. It reports what it is told, fails where it is told to, holds its caller
// to the rules of the real one that a test can break, records every call, and hands launches on to the emulator. The
// types are those of cuda.h: a signature that is wrong does not compile.
#include <cuda.h>
#include <elf.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {

struct Fault {
  int code;
  int after;  // calls that still succeed
};
using EmulatorLaunch = int (*)(const char*, unsigned, unsigned, unsigned, unsigned, int, const void*);

std::recursive_mutex mutex;
std::map<std::string, long long> told;     // settings by name; of one device as name + "." + index
std::map<std::string, Fault> faults;       // by function
std::map<std::string, bool> missing;       // functions that this driver does not have
std::string record;                        // a line a call
EmulatorLaunch emulator_launch = nullptr;  // null: launches are recorded only
int initialised_by = 0;                    // process id

struct Module {
  CUcontext context;
  std::string image;
};
struct Function {
  Module* module;
  std::string name;
  std::map<int, int> attributes;
};
std::vector<std::unique_ptr<Module>> modules;
std::vector<std::unique_ptr<Function>> functions;

thread_local std::vector<CUcontext> contexts;
thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

long long setting(const std::string& name, long long otherwise, int device = -1) {
  if (device >= 0) {
    const auto own = told.find(name + "." + std::to_string(device));
    if (own != told.end()) return own->second;
  }
  const auto found = told.find(name);
  return found == told.end() ? otherwise : found->second;
}

template <class... Values>
void note(const char* format, Values... values) {
  char line[512];
  std::snprintf(line, sizeof line, format, values...);
  record += std::string(line) + "\n";
}

// What a call is told to return, or success.
CUresult fault(const char* function) {
  const auto found = faults.find(function);
  if (found == faults.end() || found->second.after-- > 0) return CUDA_SUCCESS;
  return static_cast<CUresult>(found->second.code);
}

// What may not be done while a stream of this thread is captured, but under the relaxed mode.
CUresult unsafe_in_capture(const char* function) {
  if (setting("capturing", 0) == 0 || mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  note("%s broke the capture", function);
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

int capability(int device) { return int(setting("capability", 90, device)); }
int device_of(CUcontext context) { return int(reinterpret_cast<intptr_t>(context)) - 1; }

size_t elf_bytes(const void* image) {
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  size_t end = std::max(header->e_shoff + size_t(header->e_shnum) * header->e_shentsize,
                        header->e_phoff + size_t(header->e_phnum) * header->e_phentsize);
  for (int i = 0; i < header->e_shnum; ++i) {
    const auto* section = reinterpret_cast<const Elf64_Shdr*>(static_cast<const char*>(image) + header->e_shoff) + i;
    if (section->sh_type != SHT_NOBITS) end = std::max(end, size_t(section->sh_offset + section->sh_size));
  }
  return end;
}

// A driver runs machine code of the GPU's major version up to its own, of its own CUDA and of older ones; it compiles
// PTX that is no newer than itself.
CUresult look_at(const void* image, int on, std::string* content) {
  const auto* bytes = static_cast<const unsigned char*>(image);
  if (std::memcmp(bytes, ELFMAG, SELFMAG) == 0) {
    *content = std::string(static_cast<const char*>(image), elf_bytes(image));
    const int architecture = int(static_cast<const Elf64_Ehdr*>(image)->e_flags & 0xff);
    if (bytes[8] >= 8 && setting("version", 12000) < 13000) return CUDA_ERROR_INVALID_IMAGE;
    const bool runs = architecture / 10 == on / 10 && architecture <= on;
    note("image machine code sm_%d ABI %d", architecture, int(bytes[8]));
    return runs ? CUDA_SUCCESS : CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  *content = static_cast<const char*>(image);
  int major = 0, minor = 0;
  const size_t at = content->find(".version ");
  if (at == std::string::npos) return CUDA_ERROR_INVALID_IMAGE;
  std::sscanf(content->c_str() + at, ".version %d.%d", &major, &minor);
  note("image PTX %d.%d", major, minor);
  // PTX 8.0 came with CUDA 12.0, 8.8 with 12.9 and 9.0 with 13.0; those between are near enough.
  const int cuda = (major + 4) * 1000 + (minor >= 6 ? minor + 1 : minor) * 10;
  return cuda <= setting("version", 12000) ? CUDA_SUCCESS : CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
}

}  // namespace

#define ENTER(name)                                  \
  std::lock_guard<std::recursive_mutex> lock(mutex); \
  if (const CUresult wrong = fault(#name)) {         \
    note(#name " fails with %d", int(wrong));        \
    return wrong;                                    \
  }

// ---- What a test tells it -------------------------------------------------------------------------------------------
FAKE_API void fake_set(const char* name, long long value) { told[name] = value; }
FAKE_API void fake_fail(const char* function, int code, int after) { faults[function] = {code, after}; }
FAKE_API void fake_mend(const char* function) { faults.erase(function); }
FAKE_API void fake_miss(const char* function) { missing[function] = true; }
FAKE_API void fake_emulator(void* launch) { emulator_launch = reinterpret_cast<EmulatorLaunch>(launch); }
FAKE_API const char* fake_record() { return record.c_str(); }

// ---- The driver -----------------------------------------------------------------------------------------------------
FAKE_API CUresult CUDAAPI cuDriverGetVersion(int* version) {
  ENTER(cuDriverGetVersion)
  *version = int(setting("version", 12000));
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuInit(unsigned) {
  ENTER(cuInit)
  note("cuInit");
  if (initialised_by != 0 && initialised_by != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
  initialised_by = getpid();
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuGetErrorName(CUresult code, const char** text) {
  static const std::map<int, const char*> names = {{2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                   {200, "CUDA_ERROR_INVALID_IMAGE"},
                                                   {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                                   {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
                                                   {500, "CUDA_ERROR_NOT_FOUND"},
                                                   {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                   {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
                                                   {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  const auto found = names.find(int(code));
  *text = found == names.end() ? nullptr : found->second;
  return found == names.end() ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuGetErrorString(CUresult, const char** text) {
  *text = "as the fake driver was told";
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER(cuDeviceGet)
  if (ordinal < 0 || ordinal >= setting("devices", 1)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  ENTER(cuDeviceGetAttribute)
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = int(setting("sm_count", 132, device));
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = capability(device) / 10;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = capability(device) % 10;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = int(setting("smem_per_block", 232448, device));
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = int(setting("smem_per_sm", 233472, device));
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}
FAKE_API CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER(cuDevicePrimaryCtxRetain)
  note("cuDevicePrimaryCtxRetain device %d", device);
  if (const CUresult wrong = unsafe_in_capture("cuDevicePrimaryCtxRetain")) return wrong;
  *context = reinterpret_cast<CUcontext>(intptr_t(device) + 1);
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
  ENTER(cuCtxGetCurrent)
  *context = contexts.empty() ? nullptr : contexts.back();
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
  ENTER(cuCtxPushCurrent)
  contexts.push_back(context);
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context) {
  ENTER(cuCtxPopCurrent)
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* wanted) {
  ENTER(cuThreadExchangeStreamCaptureMode)
  std::swap(*wanted, mode);
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  ENTER(cuModuleLoadData)
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  const int device = device_of(contexts.back());
  note("cuModuleLoadData device %d%s", device, mode == CU_STREAM_CAPTURE_MODE_RELAXED ? " relaxed" : "");
  if (const CUresult wrong = unsafe_in_capture("cuModuleLoadData")) return wrong;
  auto made = std::make_unique<Module>();
  made->context = contexts.back();
  if (const CUresult wrong = look_at(image, capability(device), &made->image)) return wrong;
  *module = reinterpret_cast<CUmodule>(made.get());
  modules.push_back(std::move(made));
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  ENTER(cuModuleGetFunction)
  auto* holder = reinterpret_cast<Module*>(module);
  if (const CUresult wrong = unsafe_in_capture("cuModuleGetFunction")) return wrong;
  if (holder->image.find(name) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
  functions.push_back(std::make_unique<Function>(Function{holder, name, {}}));
  *function = reinterpret_cast<CUfunction>(functions.back().get());
  note("cuModuleGetFunction %s device %d", name, device_of(holder->context));
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  ENTER(cuFuncSetAttribute)
  auto* held = reinterpret_cast<Function*>(function);
  const int device = device_of(held->module->context);
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES &&
      value > setting("smem_per_block", 232448, device)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED && capability(device) < 90) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  held->attributes[attribute] = value;
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  ENTER(cuStreamIsCapturing)
  note("cuStreamIsCapturing stream %lld", static_cast<long long>(reinterpret_cast<intptr_t>(stream)));
  *status = setting("capturing", 0) != 0 ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuOccupancyMaxActiveClusters(int* clusters, CUfunction function,
                                                       const CUlaunchConfig* config) {
  ENTER(cuOccupancyMaxActiveClusters)
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) size = config->attrs[i].value.clusterDim.x;
  }
  const int device = device_of(reinterpret_cast<Function*>(function)->module->context);
  *clusters = int(setting("clusters", setting("sm_count", 132, device) / size, device));
  return CUDA_SUCCESS;
}
FAKE_API CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                                           void**) {
  ENTER(cuLaunchKernelEx)
  auto* held = reinterpret_cast<Function*>(function);
  const int device = device_of(held->module->context);
  unsigned cluster = 1;
  int programmatic = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = attribute.value.clusterDim.x;
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      programmatic = attribute.value.programmaticStreamSerializationAllowed;
    }
  }
  note("cuLaunchKernelEx %s device %d grid %u block %u smem %u cluster %u programmatic %d stream %lld",
       held->name.c_str(), device, config->gridDimX, config->blockDimX, config->sharedMemBytes, cluster, programmatic,
       static_cast<long long>(reinterpret_cast<intptr_t>(config->hStream)));
  if (contexts.empty() || contexts.back() != held->module->context) return CUDA_ERROR_INVALID_CONTEXT;
  if (config->gridDimX == 0 || config->blockDimX == 0 || config->blockDimX > 1024 || config->gridDimX % cluster != 0 ||
      int(config->sharedMemBytes) > held->attributes[CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES]) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if ((cluster > 1 || programmatic != 0) && capability(device) < 90) return CUDA_ERROR_NOT_SUPPORTED;
  if (cluster > 8 && held->attributes[CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] == 0) {
    return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  }
  if (programmatic != 0 && setting("capturing", 0) != 0 && setting("version", 12000) < 12030) {
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (emulator_launch == nullptr) return CUDA_SUCCESS;
  return static_cast<CUresult>(emulator_launch(held->name.c_str(), config->gridDimX, config->blockDimX,
                                               config->sharedMemBytes, cluster, programmatic, arguments[0]));
}

#undef cuGetProcAddress
FAKE_API CUresult CUDAAPI cuGetProcAddress_v2(const char* symbol, void** function, int version, cuuint64_t,
                                              CUdriverProcAddressQueryResult*) {
  ENTER(cuGetProcAddress)
  static const std::map<std::string, void*> known = {
#define KNOWN(name) {#name, reinterpret_cast<void*>(&::name)},
      KNOWN(cuInit) KNOWN(cuGetErrorName) KNOWN(cuGetErrorString) KNOWN(cuDeviceGet) KNOWN(cuDeviceGetAttribute)
          KNOWN(cuDevicePrimaryCtxRetain) KNOWN(cuCtxGetCurrent) KNOWN(cuCtxPushCurrent) KNOWN(cuCtxPopCurrent)
              KNOWN(cuThreadExchangeStreamCaptureMode) KNOWN(cuModuleLoadData) KNOWN(cuModuleGetFunction)
                  KNOWN(cuFuncSetAttribute) KNOWN(cuStreamIsCapturing) KNOWN(cuOccupancyMaxActiveClusters)
                      KNOWN(cuLaunchKernelEx)
#undef KNOWN
  };
  const auto found = known.find(symbol);
  *function = found == known.end() || missing.count(symbol) != 0 || version > setting("version", 12000) ? nullptr
                                                                                                        : found->second;
  return *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

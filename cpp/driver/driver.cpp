#include "driver/driver.h"

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "driver/api.h"
#include "driver/images.h"

namespace nsa_sel {
namespace {

using driver::api;
using driver::check;
using driver::Error;

constexpr int kMaxDevices = 64;
constexpr int kFirstWithCapturedAttribute = 12030;  // CUDA 12.3: programmatic launches may be captured

// One per GPU, made at its first use and kept: like torch, we never release a primary context.
struct Device {
  int index = 0;
  int capability = 0;  // 10 * major + minor
  DeviceLimits limits{};
  CUcontext context = nullptr;
  std::array<std::atomic<CUfunction>, kNumKernels> functions{};
  std::map<const unsigned char*, CUmodule> modules;  // by container
  std::map<int, Error> failures;                     // by kernel
};

std::mutex mutex;  // of loading; a launch of what is loaded takes none
std::array<std::atomic<Device*>, kMaxDevices> devices{};

// The context of a device for as long as this lives. Ours is the primary one, which is torch's.
class Current {
 public:
  explicit Current(CUcontext context) {
    CUcontext now = nullptr;
    check(api().cuCtxGetCurrent(&now), "cuCtxGetCurrent");
    if (now == context) return;
    check(api().cuCtxPushCurrent(context), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~Current() {
    CUcontext popped;
    if (pushed_) api().cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  bool pushed_ = false;
};

// Lets this thread load and allocate while a stream is captured: what a kernel needs is no part of the graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(api().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode"); }
  ~RelaxedCapture() { api().cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

Device* make_device(int index) {
  auto device = std::make_unique<Device>();
  const std::string name = "device " + std::to_string(index);
  CUdevice handle = 0;
  check(api().cuDeviceGet(&handle, index), name);
  int major = 0, minor = 0;
  const struct {
    int* value;
    CUdevice_attribute attribute;
  } wanted[] = {{&device->limits.sm_count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT},
                {&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR},
                {&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR},
                {&device->limits.smem_per_block, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN},
                {&device->limits.smem_per_sm, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR}};
  for (const auto& w : wanted) check(api().cuDeviceGetAttribute(w.value, w.attribute, handle), name);
  device->index = index;
  device->capability = 10 * major + minor;
  // All containers hold the same architectures. Code for an older one has neither clusters nor programmatic launches.
  const Code code = find_code(kKernelImages[0].container, device->capability);
  device->limits.capability = code.image == nullptr ? device->capability : code.capability;
  RelaxedCapture relaxed;
  check(api().cuDevicePrimaryCtxRetain(&device->context, handle), name + ": no context");
  return device.release();
}

Device& device_at(int index) {
  if (index < 0 || index >= kMaxDevices) {
    throw Error("device: expected 0 <= device < " + std::to_string(kMaxDevices) + ", got " + std::to_string(index),
                false);
  }
  api();  // also the child of a fork comes through here
  Device* device = devices[index].load(std::memory_order_acquire);
  if (device != nullptr) return *device;
  std::lock_guard<std::mutex> lock(mutex);
  device = devices[index].load(std::memory_order_relaxed);
  if (device == nullptr) {
    device = make_device(index);
    devices[index].store(device, std::memory_order_release);
  }
  return *device;
}

CUfunction load(Device& device, int kernel) {
  const std::string name = kernel_name(kernel);
  const std::string where = name + " on device " + std::to_string(device.index);
  const unsigned char* container = find_container(name);
  if (container == nullptr) throw Error(name + ": expected a kernel of this build, got none of this name", true);
  const Code code = find_code(container, device.capability);
  if (code.image == nullptr) {
    throw Error(where + ": no machine code and no PTX for compute capability " +
                    std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10),
                true);
  }

  const Current current(device.context);
  const RelaxedCapture relaxed;
  CUmodule& module = device.modules[container];
  if (module == nullptr) check(api().cuModuleLoadData(&module, code.image), where + " was not loaded");
  CUfunction function = nullptr;
  check(api().cuModuleGetFunction(&function, module, name.c_str()), where + " was not found");
  // All the shared memory that a block may ask for, and an L1 that leaves room for two blocks.
  const struct {
    CUfunction_attribute attribute;
    int value;
  } wanted[] = {{CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, device.limits.smem_per_block},
                {CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, CU_SHAREDMEM_CARVEOUT_MAX_SHARED}};
  for (const auto& w : wanted) check(api().cuFuncSetAttribute(function, w.attribute, w.value), where);
  if (code.capability >= 90) {
    check(api().cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1), where);
  }
  return function;
}

CUfunction function_of(Device& device, int kernel) {
  CUfunction function = device.functions[kernel].load(std::memory_order_acquire);
  if (function != nullptr) return function;
  std::lock_guard<std::mutex> lock(mutex);
  function = device.functions[kernel].load(std::memory_order_relaxed);
  if (function != nullptr) return function;
  const auto failed = device.failures.find(kernel);
  if (failed != device.failures.end()) throw failed->second;
  try {
    function = load(device, kernel);
  } catch (const Error& error) {
    if (error.bars) device.failures.emplace(kernel, error);
    throw;
  }
  device.functions[kernel].store(function, std::memory_order_release);
  return function;
}

struct Configuration {
  std::array<CUlaunchAttribute, 2> attributes{};
  CUlaunchConfig config{};
  Configuration(const LaunchShape& shape, void* stream) {
    config.gridDimX = shape.grid, config.gridDimY = 1, config.gridDimZ = 1;
    config.blockDimX = shape.block, config.blockDimY = 1, config.blockDimZ = 1;
    config.sharedMemBytes = shape.smem_bytes;
    config.hStream = static_cast<CUstream>(stream);
    config.attrs = attributes.data();
    if (shape.cluster > 1) {
      CUlaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
      attribute.value.clusterDim.x = shape.cluster;
      attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1;
    }
    if (shape.programmatic) {
      CUlaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
      attribute.value.programmaticStreamSerializationAllowed = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

template <class Ask>
std::optional<std::string> bar_of(const Ask& ask) {
  try {
    ask();
    return std::nullopt;
  } catch (const Error& error) {
    if (!error.bars) throw;
    return error.what();
  }
}

}  // namespace

std::optional<std::string> driver_bar() {
  return bar_of([] { api(); });
}

int driver_version() { return api().version; }

DeviceLimits device_limits(int device) { return device_at(device).limits; }

std::optional<std::string> kernel_bar(int device, int instance) {
  return bar_of([&] {
    Device& found = device_at(device);
    function_of(found, instance);
    function_of(found, combine_kernel_of(kInstances[instance].dtype));
  });
}

void forget_kernel_bars() {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& slot : devices) {
    Device* device = slot.load(std::memory_order_relaxed);
    if (device != nullptr) device->failures.clear();
  }
}

int max_active_clusters(int device, int kernel, const LaunchShape& shape) {
  Device& found = device_at(device);
  const CUfunction function = function_of(found, kernel);
  const Current current(found.context);
  const RelaxedCapture relaxed;
  const Configuration configuration(shape, nullptr);
  int clusters = 0;
  check(api().cuOccupancyMaxActiveClusters(&clusters, function, &configuration.config), "clusters");
  return clusters;
}

int launch_kernel(int device, int kernel, const LaunchShape& wanted, const void* params, void* stream) {
  Device& found = device_at(device);
  const CUfunction function = function_of(found, kernel);
  const Current current(found.context);
  LaunchShape shape = wanted;
  if (shape.programmatic && api().version < kFirstWithCapturedAttribute) {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    const CUresult code = api().cuStreamIsCapturing(static_cast<CUstream>(stream), &status);
    if (code != CUDA_SUCCESS) return int(code);
    shape.programmatic = status == CU_STREAM_CAPTURE_STATUS_NONE;
  }
  const Configuration configuration(shape, stream);
  void* arguments[] = {const_cast<void*>(params)};
  return int(api().cuLaunchKernelEx(&configuration.config, function, arguments, nullptr));
}

std::string error_string(int code) { return driver::text(static_cast<CUresult>(code)); }

bool is_refusal(int code) {
  switch (static_cast<CUresult>(code)) {
    case CUDA_ERROR_INVALID_VALUE:  // of the configuration: what else a launch is given was checked
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
    case CUDA_ERROR_INVALID_CLUSTER_SIZE:
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
    case CUDA_ERROR_JIT_COMPILATION_DISABLED:
    case CUDA_ERROR_SHARED_OBJECT_INIT_FAILED:
    case CUDA_ERROR_NOT_SUPPORTED:
      return true;
    default:
      return false;
  }
}

}  // namespace nsa_sel

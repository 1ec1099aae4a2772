// host_runtime.h - the launch calls of runtime.cuh, answered by the emulator.
#pragma once
#include <memory>

#include "device_api.h"

namespace nsa_sel::dev {

// Runs the grid before it returns, or appends it to the current stream while launches are being recorded.
template <class Params, class Shape>
int launch_kernel(void (*kernel)(Params), const Shape& shape, const Params& params, void* /*stream*/) {
  emu::LaunchRequest request{};
  request.invoke = [](void (*erased)(), const void* p) {
    reinterpret_cast<void (*)(Params)>(erased)(*static_cast<const Params*>(p));
  };
  request.kernel = reinterpret_cast<void (*)()>(kernel);
  // By value, as on the device: the caller's struct may change before a recorded launch runs.
  request.params = std::make_shared<Params>(params);
  request.params_bytes = sizeof(Params);
  request.grid = shape.grid;
  request.block = shape.block;
  request.smem_bytes = shape.smem_bytes;
  request.cluster = shape.cluster;
  request.programmatic = shape.programmatic;
  return emu::launch(std::move(request));
}

template <auto kKernel>
int configure_kernel() {
  return 0;
}

template <class Params>
int code_capability(void (*)(Params), int* out) {
  *out = 90;  // the host run has clusters and programmatic launches
  return 0;
}

}  // namespace nsa_sel::dev

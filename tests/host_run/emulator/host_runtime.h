// host_runtime.h - launches on the emulator: of kernels by their names, as a driver has them, or by function.
#pragma once
#include <memory>

#include "device_api.h"

namespace nsa_sel::emu {

template <class Params>
KernelEntry kernel_entry(const char* name, void (*kernel)(Params)) {
  return {name,
          [](void (*erased)(), const void* p) {
            reinterpret_cast<void (*)(Params)>(erased)(*static_cast<const Params*>(p));
          },
          reinterpret_cast<void (*)()>(kernel), sizeof(Params)};
}

struct Registration {
  explicit Registration(const KernelEntry& entry) { register_kernel(entry); }
};

}  // namespace nsa_sel::emu

#define NSA_SEL_KERNEL(name, Params, threads, blocks_per_sm)                                                \
  extern "C" void name(const Params p);                                                                     \
  static const ::nsa_sel::emu::Registration name##_registration(::nsa_sel::emu::kernel_entry(#name, name)); \
  extern "C" void name(const Params p)

namespace nsa_sel::dev {

// Runs the grid before it returns, or appends it to the current stream while launches are being recorded.
template <class Params, class Shape>
int launch_kernel(void (*kernel)(Params), const Shape& shape, const Params& params, void* /*stream*/) {
  return emu::launch(emu::kernel_entry("", kernel), &params, shape.grid, shape.block, shape.smem_bytes, shape.cluster,
                     shape.programmatic);
}

}  // namespace nsa_sel::dev

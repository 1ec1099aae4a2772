// fault.h - what every planted fault is made of: one kernel, wrong where `kFault` is true and right where it is false.
#pragma once
#include "host_primitives.h"
#include "host_runtime.h"

namespace nsa_sel::faults {

struct Params {
  float* out;         // [256]
  const float* in;    // [1024]
  float* scratch;     // [1024]
  unsigned* counter;  // [4], zero
};

struct Shape {
  unsigned grid = 1;
  unsigned block = 128;
  unsigned smem_bytes = 4096;
  unsigned cluster = 1;
  bool programmatic = false;
};

}  // namespace nsa_sel::faults

// Launches the kernel `name<faulty>(Params)` with a Shape of the given fields.
#define NSA_SEL_FAULT(name, ...)                                                                            \
  extern "C" int fault_##name(int faulty, float* out, const float* in, float* scratch, unsigned* counter) { \
    using namespace nsa_sel;                                                                                \
    const faults::Shape shape{__VA_ARGS__};                                                                 \
    return dev::launch_kernel(faulty ? faults::name<true> : faults::name<false>, shape,                     \
                              faults::Params{out, in, scratch, counter}, nullptr);                          \
  }

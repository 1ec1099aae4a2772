// launch.h - a planned call as launches of named kernels. No CUDA header needed.
#pragma once
#include <string>

#include "dispatch.h"
#include "instances.h"

namespace nsa_sel {

struct LaunchShape {
  unsigned grid;
  unsigned block;
  unsigned smem_bytes;
  unsigned cluster = 1;       // blocks per cluster (sm_90)
  bool programmatic = false;  // may start before the previous grid of the stream has ended (sm_90)
};

// Kernels are numbered: the instances in the order of kInstances, then the combine kernel of each dtype.
constexpr int kNumKernels = kNumInstances + 2;
constexpr int combine_kernel_of(Dtype dtype) { return kNumInstances + int(dtype); }
std::string instance_name(const InstanceKey& key);  // as bfloat16_192x128_h16
std::string kernel_name(int kernel);                // as nsa_sel_decode_bfloat16_192x128_h16; see cuda/kernel_entry.cuh

// Puts one launch on a stream of the device. Returns 0 or an error of the driver. The driver layer defines it, and in
// the emulator's library the emulator does.
int launch_kernel(int device, int kernel, const LaunchShape& shape, const void* params, void* stream);

// Runs the decode kernel and, for splits without a cluster, the combine kernel. Returns 0 or an error of the driver.
int run_decode(const DecodeLaunch& launch, int device, void* stream);

}  // namespace nsa_sel

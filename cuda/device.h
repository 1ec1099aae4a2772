// device.h - the device's limits, its errors, and a prepared launch on a stream. No CUDA header needed.
#pragma once
#include <string>

#include "../cpp/dispatch.h"

namespace nsa_sel {

DeviceLimits device_limits(int index);  // throws std::runtime_error where the device cannot be asked
std::string error_string(int code);
// Whether the device will never take this launch and can go on with others. Everything else (a lost context, a broken
// capture, no memory) says nothing of the kernel: it must be raised, never worked around.
bool is_refusal(int code);

// Runs the decode kernel and, for splits without a cluster, the combine kernel. Returns 0 or a cudaError_t.
int run_decode(const DecodeLaunch& launch, void* stream);

}  // namespace nsa_sel

// device.h - the device's limits, its errors, and a prepared launch on a stream. No CUDA header needed.
#pragma once
#include <string>

#include "../cpp/dispatch.h"

namespace nsa_sel {

DeviceLimits device_limits(int index);  // throws std::runtime_error where the device cannot be asked
std::string error_string(int code);
// After a sticky error every later call of the process fails; it must be raised, never worked around.
bool is_sticky(int code);

// Runs the decode kernel and, for splits without a cluster, the combine kernel. Returns 0 or a cudaError_t.
int run_decode(const DecodeLaunch& launch, void* stream);

}  // namespace nsa_sel

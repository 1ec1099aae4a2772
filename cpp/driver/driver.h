// driver.h - devices, kernels and launches through the NVIDIA driver. Nothing is loaded before it is needed; every
// function may be called from any thread and inside a stream's capture. No CUDA header needed.
#pragma once
#include <optional>
#include <string>

#include "launch.h"

namespace nsa_sel {

// Why no kernel can run on any GPU here (no driver, one too old); nothing where one can. Throws what must be raised.
std::optional<std::string> driver_bar();
int driver_version();  // newest CUDA that the driver knows, as 12040; throws where there is no usable driver

// Throws driver::Error, a std::runtime_error, where the device cannot be asked.
DeviceLimits device_limits(int device);

// Loads an instance, and the combine kernel of its dtype, unless they are. Why they cannot run on the device,
// remembered until forget_kernel_bars(); nothing where they can. Throws what must be raised.
std::optional<std::string> kernel_bar(int device, int instance);
void forget_kernel_bars();

// How many clusters of a loaded kernel the device can hold at once; 0: not one.
int max_active_clusters(int device, int kernel, const LaunchShape& shape);

std::string error_string(int code);  // name and text of a code of launch_kernel
// Whether the device will never take this launch and can go on with others. Everything else (a lost context, a broken
// capture) says nothing of the kernel: it must be raised, never worked around.
bool is_refusal(int code);

}  // namespace nsa_sel

// kernel_host.cpp - the C interface through which Python plans and launches the kernel on the emulator.
#include <cstdio>
#include <cstring>
#include <exception>

#include "../../cpp/dispatch.h"
#include "../../cpp/instances.h"
#include "../../cpp/launch.h"

using namespace nsa_sel;

namespace {
DecodeLaunch prepared;
}

extern "C" int emu_launch(const char* name, unsigned grid, unsigned block, unsigned smem_bytes, unsigned cluster,
                          int programmatic, const void* params);

// In place of the driver's.
int nsa_sel::launch_kernel(int /*device*/, int kernel, const LaunchShape& shape, const void* params, void* /*stream*/) {
  return emu_launch(kernel_name(kernel).c_str(), shape.grid, shape.block, shape.smem_bytes, shape.cluster,
                    shape.programmatic, params);
}

extern "C" {

struct PlanSummary {
  int64_t grid, blocks_per_sm, num_slots, smem_bytes, full_rows, split_rows, num_splits, cluster, workspace_floats;
};

// Returns 0, or 1 with a message where the planner refuses.
int nsa_prepare(const void* request, const DeviceLimits* device, PlanSummary* summary, char* message,
                int message_bytes) {
  try {
    DecodeRequest r;
    std::memcpy(&r, request, sizeof r);  // packed by Python, which promises no alignment
    prepared = prepare_decode(r, *device);
  } catch (const std::exception& error) {
    std::snprintf(message, size_t(message_bytes), "%s", error.what());
    return 1;
  }
  const DecodePlan& plan = prepared.plan;
  *summary = {plan.grid,       plan.blocks_per_sm, plan.smem.num_slots, plan.smem.total,      plan.full_rows,
              plan.split_rows, plan.num_splits,    plan.cluster,        plan.workspace_floats};
  return 0;
}

int nsa_launch(float* workspace) {
  prepared.set_workspace(workspace);
  return run_decode(prepared, 0, nullptr);
}

int nsa_num_instances() { return kNumInstances; }

void nsa_instance(int index, int64_t* out) {
  const InstanceKey& key = kInstances[index];
  out[0] = int64_t(key.dtype);
  out[1] = key.Dk;
  out[2] = key.Dv;
  out[3] = key.head_tile;
  out[4] = int64_t(key.loads);
  out[5] = int64_t(key.cache);
}

// Member `index` of a DecodeRequest: its number of 64-bit values and its name, null behind the last.
const char* nsa_request_field(int index, int64_t* count) {
  if (size_t(index) >= sizeof(kRequestFields) / sizeof(kRequestFields[0])) return nullptr;
  *count = int64_t(kRequestFields[index].count);
  return kRequestFields[index].name;
}

}  // extern "C"

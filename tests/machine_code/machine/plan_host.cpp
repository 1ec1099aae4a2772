// plan_host.cpp - the package's own planner and launcher, with the machine in the driver's place: from a request to the
// grids that would be launched and the very bytes of their parameters.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "../../../cpp/launch.h"

namespace {

struct Launched {
  std::string kernel;
  nsa_sel::LaunchShape shape;
  std::vector<uint8_t> parameters;
};

nsa_sel::DecodeLaunch prepared;
std::vector<Launched> launched;

}  // namespace

int nsa_sel::launch_kernel(int /*device*/, int kernel, const LaunchShape& shape, const void* params, void* /*stream*/) {
  const auto* bytes = static_cast<const uint8_t*>(params);
  const size_t size = kernel < kNumInstances ? sizeof(DecodeParams) : sizeof(CombineParams);
  launched.push_back({kernel_name(kernel), shape, {bytes, bytes + size}});
  return 0;
}

extern "C" {

struct PlanFigures {
  int64_t grid, num_slots, full_rows, split_rows, num_splits, cluster, workspace_floats;
};

// Returns 0, or 1 with a message where the planner refuses.
int machine_plan(const void* request, const nsa_sel::DeviceLimits* device, PlanFigures* out, char* message,
                 int message_bytes) {
  try {
    nsa_sel::DecodeRequest r;
    std::memcpy(&r, request, sizeof r);  // packed by Python, which promises no alignment
    prepared = prepare_decode(r, *device);
  } catch (const std::exception& error) {
    std::snprintf(message, size_t(message_bytes), "%s", error.what());
    return 1;
  }
  const nsa_sel::DecodePlan& plan = prepared.plan;
  *out = {plan.grid,
          plan.smem.num_slots,
          plan.full_rows,
          plan.split_rows,
          plan.num_splits,
          plan.cluster ? plan.num_splits : 1,
          plan.workspace_floats};
  return 0;
}

// How many grids the plan launches, in order.
int machine_grids(float* workspace) {
  launched.clear();
  prepared.set_workspace(workspace);
  return nsa_sel::run_decode(prepared, 0, nullptr) == 0 ? int(launched.size()) : -1;
}

struct GridFigures {
  const char* kernel;
  const void* parameters;
  int64_t parameter_bytes, grid, threads, shared_bytes, cluster;
};

void machine_grid(int index, GridFigures* out) {
  const Launched& l = launched[size_t(index)];
  *out = {l.kernel.c_str(),       l.parameters.data(),         int64_t(l.parameters.size()), int64_t(l.shape.grid),
          int64_t(l.shape.block), int64_t(l.shape.smem_bytes), int64_t(l.shape.cluster)};
}

int64_t machine_request_bytes() { return sizeof(nsa_sel::DecodeRequest); }

}  // extern "C"

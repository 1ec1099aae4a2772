// plan_host.cpp - the package's own planner: from a request to the two grids and the very bytes of their parameters.
#include <cstdio>
#include <cstring>
#include <exception>

#include "../../../cpp/dispatch.h"
#include "../../../cpp/instances.h"

namespace {
nsa_sel::DecodeLaunch prepared;
}

extern "C" {

struct PlannedLaunch {
  int64_t dtype, Dk, Dv, head_tile, loads;  // of the instance
  int64_t grid, cluster, threads, shared_bytes, num_slots, num_splits, workspace_floats;
  int64_t combine_grid, combine_threads;  // 0: no second kernel
  int64_t decode_bytes, combine_bytes;
};

// Returns 0, or 1 with a message where the planner refuses.
int machine_plan(const void* request, const nsa_sel::DeviceLimits* device, PlannedLaunch* out, char* message,
                 int message_bytes) {
  try {
    nsa_sel::DecodeRequest r;
    std::memcpy(&r, request, sizeof r);  // packed by Python, which promises no alignment
    prepared = prepare_decode(r, *device);
  } catch (const std::exception& error) {
    std::snprintf(message, size_t(message_bytes), "%s", error.what());
    return 1;
  }
  using nsa_sel::kCombineThreads;
  const nsa_sel::DecodePlan& plan = prepared.plan;
  const nsa_sel::InstanceKey& key = nsa_sel::kInstances[prepared.instance];
  const int chunks = (prepared.decode.h * key.Dv / 4 + kCombineThreads - 1) / kCombineThreads;
  *out = {int64_t(key.dtype),
          key.Dk,
          key.Dv,
          key.head_tile,
          int64_t(key.loads),
          plan.grid,
          plan.cluster ? plan.num_splits : 1,
          nsa_sel::kDecodeThreads,
          plan.smem.total,
          plan.smem.num_slots,
          plan.num_splits,
          plan.workspace_floats,
          prepared.needs_combine() ? int64_t(plan.split_rows) * chunks : 0,
          kCombineThreads,
          int64_t(sizeof(nsa_sel::DecodeParams)),
          int64_t(sizeof(nsa_sel::CombineParams))};
  return 0;
}

void machine_parameters(float* workspace, void* decode, void* combine) {
  prepared.set_workspace(workspace);
  std::memcpy(decode, &prepared.decode, sizeof prepared.decode);
  std::memcpy(combine, &prepared.combine, sizeof prepared.combine);
}

int64_t machine_request_bytes() { return sizeof(nsa_sel::DecodeRequest); }

}  // extern "C"

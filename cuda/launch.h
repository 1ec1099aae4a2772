// launch.h - what the bindings call: a compiled instance behind plain function pointers. No CUDA header needed.
#pragma once
#include "../cpp/instances.h"
#include "../cpp/params.h"

namespace nsa_sel {

struct DecodeInstance {
  InstanceKey key;
  // Each returns 0 or a cudaError_t.
  int (*launch)(const DecodeParams& params, int grid, int cluster, void* stream);
  int (*blocks_per_sm)(int smem_bytes, int* out);
};

const DecodeInstance& decode_instance(int index);  // in the order of kInstances

// Merges a split launch; `programmatic` lets it start while the decode kernel drains (sm_90).
int launch_combine(Dtype dtype, const CombineParams& params, bool programmatic, void* stream);

}  // namespace nsa_sel

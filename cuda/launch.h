// launch.h - what the bindings call: a compiled instance behind plain function pointers. No CUDA header needed.
#pragma once
#include "../cpp/instances.h"
#include "../cpp/params.h"

namespace nsa_sel {

struct DecodeInstance {
  InstanceKey key;
  // Returns 0 or a cudaError_t.
  int (*launch)(const DecodeParams& params, int grid, int cluster, void* stream);
};

const DecodeInstance& decode_instance(int index);  // in the order of kInstances

// Merges a split launch; `programmatic` lets it start while the decode kernel drains (sm_90).
int launch_combine(Dtype dtype, const CombineParams& params, bool programmatic, void* stream);

// The compute capability that the code running on the current device was compiled for: less than the device's where the
// driver compiles it from older PTX, and then without that device's clusters and programmatic launches.
int code_capability(int* out);

}  // namespace nsa_sel

#include "device.h"
#include "launch.h"

namespace nsa_sel {

int run_decode(const DecodeLaunch& launch, void* stream) {
  const DecodePlan& plan = launch.plan;
  if (plan.grid == 0) return 0;
  const DecodeInstance& instance = decode_instance(launch.instance);
  const int error = instance.launch(launch.decode, plan.grid, plan.cluster ? plan.num_splits : 1, stream);
  if (error != 0 || !launch.needs_combine()) return error;
  return launch_combine(instance.key.dtype, launch.combine, launch.programmatic, stream);
}

}  // namespace nsa_sel

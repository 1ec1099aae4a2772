#include "launch.h"

namespace nsa_sel {
namespace {

std::string dtype_name(Dtype dtype) { return dtype == Dtype::kFloat16 ? "float16" : "bfloat16"; }

}  // namespace

std::string instance_name(const InstanceKey& key) {
  return dtype_name(key.dtype) + "_" + std::to_string(key.Dk) + "x" + std::to_string(key.Dv) + "_h" +
         std::to_string(key.head_tile) + (key.loads == Loads::kBulk ? "_bulk" : "") +
         (key.cache == Cache::kFloat8E4m3 ? "_float8" : "");
}

std::string kernel_name(int kernel) {
  if (kernel < kNumInstances) return "nsa_sel_decode_" + instance_name(kInstances[kernel]);
  return "nsa_sel_combine_" + dtype_name(Dtype(kernel - kNumInstances));
}

int run_decode(const DecodeLaunch& launch, int device, void* stream) {
  const DecodePlan& plan = launch.plan;
  if (plan.grid == 0) return 0;
  const unsigned cluster = plan.cluster ? unsigned(plan.num_splits) : 1;
  const LaunchShape decode{unsigned(plan.grid), kDecodeThreads, plan.smem.total, cluster, false};
  const int error = launch_kernel(device, launch.instance, decode, &launch.decode, stream);
  if (error != 0 || !launch.needs_combine()) return error;

  const CombineParams& params = launch.combine;
  const LaunchShape combine{unsigned(params.split_rows * params.chunks), kCombineThreads, 0, 1, launch.programmatic};
  const Dtype dtype = kInstances[launch.instance].dtype;
  return launch_kernel(device, combine_kernel_of(dtype), combine, &params, stream);
}

}  // namespace nsa_sel

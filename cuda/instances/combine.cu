#include "../combine_kernel.cuh"
#include "../kernel_entry.cuh"

namespace nsa_sel {
NSA_SEL_KERNEL(nsa_sel_combine_float16, CombineParams, kCombineThreads, 1) { combine_kernel<__half>(p); }
NSA_SEL_KERNEL(nsa_sel_combine_bfloat16, CombineParams, kCombineThreads, 1) { combine_kernel<__nv_bfloat16>(p); }
}  // namespace nsa_sel

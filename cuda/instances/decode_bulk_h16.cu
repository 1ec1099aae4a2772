#include "../launch.cuh"

namespace nsa_sel {
NSA_SEL_INSTANTIATE_DECODE(kFloat16, 128, 128, 16, kBulk)
NSA_SEL_INSTANTIATE_DECODE(kFloat16, 192, 128, 16, kBulk)
NSA_SEL_INSTANTIATE_DECODE(kBfloat16, 128, 128, 16, kBulk)
NSA_SEL_INSTANTIATE_DECODE(kBfloat16, 192, 128, 16, kBulk)
}  // namespace nsa_sel

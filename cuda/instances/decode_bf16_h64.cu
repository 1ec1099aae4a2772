#include "../launch.cuh"

namespace nsa_sel {
NSA_SEL_INSTANTIATE_DECODE(kBfloat16, 64, 64, 64, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kBfloat16, 64, 128, 64, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kBfloat16, 128, 64, 64, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kBfloat16, 128, 128, 64, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kBfloat16, 192, 128, 64, kCpAsync)
}  // namespace nsa_sel

#include "../launch.cuh"

namespace nsa_sel {
NSA_SEL_INSTANTIATE_DECODE(kFloat16, 64, 64, 16, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kFloat16, 64, 128, 16, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kFloat16, 128, 64, 16, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kFloat16, 128, 128, 16, kCpAsync)
NSA_SEL_INSTANTIATE_DECODE(kFloat16, 192, 128, 16, kCpAsync)
}  // namespace nsa_sel

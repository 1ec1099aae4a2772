#include "../kernel_entry.cuh"

namespace nsa_sel {
NSA_SEL_FOR_EACH_DIMS(NSA_SEL_DECODE_FLOAT8_H32, kBfloat16)
}  // namespace nsa_sel

#include "../kernel_entry.cuh"

namespace nsa_sel {
NSA_SEL_FOR_EACH_DIMS(NSA_SEL_DECODE_FLOAT8_H64, kFloat16)
}  // namespace nsa_sel

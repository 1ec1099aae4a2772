#include "../kernel_entry.cuh"

namespace nsa_sel {
NSA_SEL_FOR_EACH_BULK_DIMS(NSA_SEL_DECODE_BULK_H16)
}  // namespace nsa_sel

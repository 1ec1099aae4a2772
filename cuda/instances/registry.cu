// The table of compiled kernels. An instance that is listed in cpp/instances.h but compiled nowhere fails at link.
#include "../launch.h"

namespace nsa_sel {

template <Dtype kDtype, int kDk, int kDv, int kHeadTile>
int launch_decode(const DecodeParams& params, int grid, int cluster, void* stream);
template <Dtype kDtype, int kDk, int kDv, int kHeadTile>
int decode_blocks_per_sm(int smem_bytes, int* out);

const DecodeInstance& decode_instance(int index) {
#define NSA_SEL_ENTRY(dtype, Dk, Dv, head_tile)    \
  {{Dtype::dtype, Dk, Dv, head_tile},              \
   launch_decode<Dtype::dtype, Dk, Dv, head_tile>, \
   decode_blocks_per_sm<Dtype::dtype, Dk, Dv, head_tile>},
#define NSA_SEL_ENTRIES(dtype, Dk, Dv) \
  NSA_SEL_ENTRY(dtype, Dk, Dv, 16) NSA_SEL_ENTRY(dtype, Dk, Dv, 32) NSA_SEL_ENTRY(dtype, Dk, Dv, 64)
  static const DecodeInstance table[] = {NSA_SEL_FOR_EACH_DIMS(NSA_SEL_ENTRIES, kFloat16)
                                             NSA_SEL_FOR_EACH_DIMS(NSA_SEL_ENTRIES, kBfloat16)};
  static_assert(sizeof(table) / sizeof(table[0]) == kNumInstances);
#undef NSA_SEL_ENTRIES
#undef NSA_SEL_ENTRY
  return table[index];
}

}  // namespace nsa_sel

// The table of compiled kernels. An instance that is listed in cpp/instances.h but compiled nowhere fails at link.
#include "../launch.h"

namespace nsa_sel {

template <Dtype kDtype, int kDk, int kDv, int kHeadTile, Loads kLoads>
int launch_decode(const DecodeParams& params, int grid, int cluster, void* stream);

const DecodeInstance& decode_instance(int index) {
#define NSA_SEL_ENTRY(dtype, Dk, Dv, head_tile, loads)              \
  {                                                                 \
      {Dtype::dtype, Dk, Dv, head_tile, Loads::loads},              \
      launch_decode<Dtype::dtype, Dk, Dv, head_tile, Loads::loads>, \
  },
#define NSA_SEL_ENTRIES(dtype, Dk, Dv)       \
  NSA_SEL_ENTRY(dtype, Dk, Dv, 16, kCpAsync) \
  NSA_SEL_ENTRY(dtype, Dk, Dv, 32, kCpAsync) \
  NSA_SEL_ENTRY(dtype, Dk, Dv, 64, kCpAsync)
#define NSA_SEL_BULK_ENTRY(dtype, Dk, Dv) NSA_SEL_ENTRY(dtype, Dk, Dv, 16, kBulk)
  static const DecodeInstance table[] = {NSA_SEL_FOR_EACH_DIMS(NSA_SEL_ENTRIES, kFloat16) NSA_SEL_FOR_EACH_DIMS(
      NSA_SEL_ENTRIES, kBfloat16) NSA_SEL_FOR_EACH_BULK_DIMS(NSA_SEL_BULK_ENTRY)};
  static_assert(sizeof(table) / sizeof(table[0]) == kNumInstances);
#undef NSA_SEL_BULK_ENTRY
#undef NSA_SEL_ENTRIES
#undef NSA_SEL_ENTRY
  return table[index];
}

}  // namespace nsa_sel

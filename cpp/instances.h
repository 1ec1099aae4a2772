// instances.h - the one table of compiled kernels: router, launcher, build_info() and the README's matrix all read it.
#pragma once
#include <cstddef>

#include "params.h"
#include "tile_shape.h"

namespace nsa_sel {

// X(dtype, Dk, Dv): every line is compiled for the three head tiles 16, 32 and 64. Dims are multiples of kDimStep.
// clang-format off
#define NSA_SEL_FOR_EACH_DIMS(X, dtype) \
  X(dtype, 64, 64)                      \
  X(dtype, 64, 128)                     \
  X(dtype, 128, 64)                     \
  X(dtype, 128, 128)                    \
  X(dtype, 192, 128)
// clang-format on

// And once more for a float8 cache.

// Experiments beside them, at most four: bulk copies at the shapes of NSA and MiniMax-M3.
#define NSA_SEL_FOR_EACH_BULK_DIMS(X) \
  X(kFloat16, 128, 128) X(kFloat16, 192, 128) X(kBfloat16, 128, 128) X(kBfloat16, 192, 128)

// The kernels are made from the lists above; the table would be data in the module of every one.
#if !defined(__CUDACC_RTC__)

struct InstanceKey {
  Dtype dtype;
  int Dk, Dv, head_tile;
  Loads loads;
  Cache cache;
};

inline constexpr InstanceKey kInstances[] = {
#define NSA_SEL_KEY(dtype, Dk, Dv, head_tile, cache) {Dtype::dtype, Dk, Dv, head_tile, Loads::kCpAsync, Cache::cache},
#define NSA_SEL_KEYS(dtype, Dk, Dv, cache) \
  NSA_SEL_KEY(dtype, Dk, Dv, 16, cache) NSA_SEL_KEY(dtype, Dk, Dv, 32, cache) NSA_SEL_KEY(dtype, Dk, Dv, 64, cache)
#define NSA_SEL_SAME_KEYS(dtype, Dk, Dv) NSA_SEL_KEYS(dtype, Dk, Dv, kSame)
#define NSA_SEL_FLOAT8_KEYS(dtype, Dk, Dv) NSA_SEL_KEYS(dtype, Dk, Dv, kFloat8E4m3)
#define NSA_SEL_BULK_KEY(dtype, Dk, Dv) {Dtype::dtype, Dk, Dv, 16, Loads::kBulk, Cache::kSame},
    NSA_SEL_FOR_EACH_DIMS(NSA_SEL_SAME_KEYS, kFloat16) NSA_SEL_FOR_EACH_DIMS(NSA_SEL_SAME_KEYS, kBfloat16)
        NSA_SEL_FOR_EACH_DIMS(NSA_SEL_FLOAT8_KEYS, kFloat16) NSA_SEL_FOR_EACH_DIMS(NSA_SEL_FLOAT8_KEYS, kBfloat16)
            NSA_SEL_FOR_EACH_BULK_DIMS(NSA_SEL_BULK_KEY)
#undef NSA_SEL_BULK_KEY
#undef NSA_SEL_FLOAT8_KEYS
#undef NSA_SEL_SAME_KEYS
#undef NSA_SEL_KEYS
#undef NSA_SEL_KEY
};
// The width of a swizzled row in shared memory: a tile is made of whole ones.
inline constexpr int kDimStep = 64;
constexpr bool dims_are_whole_steps() {
  for (const InstanceKey& key : kInstances) {
    if (key.Dk % kDimStep != 0 || key.Dv % kDimStep != 0) return false;
  }
  return true;
}
static_assert(dims_are_whole_steps(), "Dk and Dv of a kernel are multiples of 64");

inline constexpr int kNumInstances = int(sizeof(kInstances) / sizeof(kInstances[0]));

// The index in kInstances of the smallest head tile that holds h heads, or -1.
constexpr int find_instance(Dtype dtype, int Dk, int Dv, int h, Loads loads = Loads::kCpAsync,
                            Cache cache = Cache::kSame) {
  for (int i = 0; i < kNumInstances; ++i) {
    const InstanceKey& key = kInstances[i];
    const bool same = key.dtype == dtype && key.Dk == Dk && key.Dv == Dv && key.loads == loads && key.cache == cache;
    if (same && h >= 1 && h <= key.head_tile) return i;
  }
  return -1;
}

#endif  // __CUDACC_RTC__

}  // namespace nsa_sel

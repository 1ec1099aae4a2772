// kernel_entry.cuh - gives the compiled kernels their names, by which cpp/launch.cpp finds them (kernel_name there).
// Included by the files in instances/ only.
#pragma once
#include "../cpp/instances.h"
#include "decode_kernel.cuh"

#if defined(NSA_SEL_HOST_RUN)
#include "host_runtime.h"  // the emulator's NSA_SEL_KERNEL
#else
#define NSA_SEL_KERNEL(name, Params, threads, blocks_per_sm) \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(const __grid_constant__ Params p)
#endif

namespace nsa_sel {

template <Dtype kDtype>
struct ElementOf;
template <>
struct ElementOf<Dtype::kFloat16> {
  using type = __half;
};
template <>
struct ElementOf<Dtype::kBfloat16> {
  using type = __nv_bfloat16;
};

}  // namespace nsa_sel

#define NSA_SEL_NAME_kFloat16 float16
#define NSA_SEL_NAME_kBfloat16 bfloat16
#define NSA_SEL_NAME_kCpAsync
#define NSA_SEL_NAME_kBulk _bulk
#define NSA_SEL_NAME_kSame
#define NSA_SEL_NAME_kFloat8E4m3 _float8
#define NSA_SEL_PASTE(dtype, Dk, Dv, head_tile, loads, cache) \
  nsa_sel_decode_##dtype##_##Dk##x##Dv##_h##head_tile##loads##cache
#define NSA_SEL_DECODE_NAME(...) NSA_SEL_PASTE(__VA_ARGS__)

// One compiled decode kernel, as nsa_sel_decode_bfloat16_192x128_h16.
#define NSA_SEL_DECODE(dtype, Dk, Dv, head_tile, loads, cache)                                                  \
  NSA_SEL_DECODE_AS(                                                                                            \
      NSA_SEL_DECODE_NAME(NSA_SEL_NAME_##dtype, Dk, Dv, head_tile, NSA_SEL_NAME_##loads, NSA_SEL_NAME_##cache), \
      DecodeTraits<typename ElementOf<Dtype::dtype>::type, Dk, Dv, head_tile, Loads::loads, Cache::cache>)
#define NSA_SEL_DECODE_AS(name, ...)                                                         \
  NSA_SEL_KERNEL(name, DecodeParams, (__VA_ARGS__::kThreads), (__VA_ARGS__::kBlocksPerSm)) { \
    decode_kernel<__VA_ARGS__>(p);                                                           \
  }

// For NSA_SEL_FOR_EACH_DIMS and NSA_SEL_FOR_EACH_BULK_DIMS.
#define NSA_SEL_DECODE_H16(dtype, Dk, Dv) NSA_SEL_DECODE(dtype, Dk, Dv, 16, kCpAsync, kSame)
#define NSA_SEL_DECODE_H32(dtype, Dk, Dv) NSA_SEL_DECODE(dtype, Dk, Dv, 32, kCpAsync, kSame)
#define NSA_SEL_DECODE_H64(dtype, Dk, Dv) NSA_SEL_DECODE(dtype, Dk, Dv, 64, kCpAsync, kSame)
#define NSA_SEL_DECODE_FLOAT8_H16(dtype, Dk, Dv) NSA_SEL_DECODE(dtype, Dk, Dv, 16, kCpAsync, kFloat8E4m3)
#define NSA_SEL_DECODE_FLOAT8_H32(dtype, Dk, Dv) NSA_SEL_DECODE(dtype, Dk, Dv, 32, kCpAsync, kFloat8E4m3)
#define NSA_SEL_DECODE_FLOAT8_H64(dtype, Dk, Dv) NSA_SEL_DECODE(dtype, Dk, Dv, 64, kCpAsync, kFloat8E4m3)
#define NSA_SEL_DECODE_BULK_H16(dtype, Dk, Dv) NSA_SEL_DECODE(dtype, Dk, Dv, 16, kBulk, kSame)

// primitives.cuh - the only file with PTX. Kernels call dev::* and CUDA built-ins and nothing else, so that the same
// kernel source also compiles for the host, where `host_primitives.h` gives every one of these a checked twin.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(NSA_SEL_HOST_RUN)
#include "host_primitives.h"
#else

#include <cuda/std/cstddef>
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>

#if !defined(INFINITY)  // a macro of math.h, which NVRTC does not have
#define INFINITY __int_as_float(0x7f800000)
#endif

#define NSA_SEL_DYNAMIC_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]

namespace nsa_sel::dev {

using cuda::std::size_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;

// ---- Addresses and plain accesses -----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A typed view of `count` elements at a byte offset of dynamic shared memory; the label names it in host-run findings.
template <class T>
__device__ __forceinline__ T* smem_at(unsigned char* base, size_t byte_offset, size_t /*count*/,
                                      const char* /*label*/) {
  return reinterpret_cast<T*>(base + byte_offset);
}

// The same value, which the compiler has to keep in a register: it neither computes it again at every use nor pulls it
// out of a loop or an address apart. By default from sm_90 on, where a shared address starts with the block's rank in
// its cluster; below, what is computed again is cheap and the registers are better spent elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kKeepByDefault = false;
#else
constexpr bool kKeepByDefault = true;
#endif
template <bool kKept = kKeepByDefault, class T>
__device__ __forceinline__ T keep(T x) {
  if constexpr (kKept && sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else if constexpr (kKept) {
    asm volatile("" : "+r"(x));
  }
  return x;
}

template <class T>
__device__ __forceinline__ T load(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store(T* p, const T& value) {
  *p = value;
}

// ---- Asynchronous copies and mbarriers ------------------------------------------------------------------------------

// 16 bytes global -> shared, bypassing L1; not valid: writes zeros and does not touch the source.
__device__ __forceinline__ void cp_async_16(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_address(dst)), "l"(src), "r"(valid ? 16 : 0)
               : "memory");
}

// The same at constant distances from both addresses, which the instruction holds: no addition a copy.
template <int kDstOffset, int kSrcOffset>
__device__ __forceinline__ void cp_async_16_at(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;\n" ::"r"(smem_address(dst)), "l"(src),
               "r"(valid ? 16 : 0), "n"(kDstOffset), "n"(kSrcOffset)
               : "memory");
}

// 4 bytes, which only the way through L1 takes.
__device__ __forceinline__ void cp_async_4(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(smem_address(dst)), "l"(src), "r"(valid ? 4 : 0)
               : "memory");
}

// One arrival on `barrier` when all earlier cp.async of this thread have landed (counted in the barrier's init count).
__device__ __forceinline__ void cp_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(smem_address(barrier)) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// sm_90: `bytes` (a multiple of 16) global -> shared by the copy engine, counted down from the barrier's expected
// bytes.
__device__ __forceinline__ void bulk_copy_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   smem_address(dst)),
               "l"(src), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
#endif
}
// One arrival that also announces `bytes` of bulk copies for the current phase.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}\n" ::"r"(
                   smem_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}
// Makes mbarrier inits visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}
// Orders this thread's ordinary accesses of shared memory before later ones by the copy engine.
__device__ __forceinline__ void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(smem_address(barrier))
               : "memory");
}
// Returns once the phase with this parity has completed; on a fresh barrier parity 1 counts as completed.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = smem_address(barrier);
  uint32_t done = 0;
  while (done == 0) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
    if (done == 0) __nanosleep(20);  // leave the issue slots to the warps that are waited for
#endif
  }
  __syncwarp();  // lanes may leave the loop one by one, and the next instruction is often .aligned
}

// Barrier `id` (1..15) for `threads` threads of the block; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// d[16 x 8] += a[16 x 16] * b[16 x 8] in FP32. Volatile although it is arithmetic: all lanes take part, so the compiler
// must not sink it into a branch (where the fragments would have to stay in registers as well).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (cuda::std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Transposes an 8x8 matrix of 16-bit values held as one fragment register a lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t value) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(value));
  return result;
}

// ---- float8_e4m3fn -> 16 bit ----------------------------------------------------------------------------------------

#if __CUDA_ARCH__ < 890
// Magnitudes `magnitude` of two e4m3 codes, in the places of a 16-bit format's exponent and mantissa: subnormal or
// small numbers of that format, which one exact multiplication brings up. The code behind the largest number is NaN:
// the comparison gives all ones, which is a NaN to add. Both formats order their numbers as FP16 does its own.
template <class T>
__device__ __forceinline__ uint32_t widened(uint32_t magnitude, uint32_t signs) {
  uint32_t result, nan;
  const uint32_t x = magnitude | (signs & 0x80008000u);
  if constexpr (cuda::std::is_same_v<T, __nv_bfloat16>) {
    asm("set.gt.u32.f16x2 %0, %1, %2;\n" : "=r"(nan) : "r"(magnitude), "r"(0x07e007e0u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(x), "r"(0x7b807b80u), "r"(nan));  // 2^120
  } else {
    asm("set.gt.u32.f16x2 %0, %1, %2;\n" : "=r"(nan) : "r"(magnitude), "r"(0x3f003f00u));
    asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(x), "r"(0x5c005c00u), "r"(nan));  // 2^8
  }
  return result;
}
#else
template <class T>
__device__ __forceinline__ uint32_t widened(uint32_t halves) {
  if constexpr (cuda::std::is_same_v<T, __half>) return halves;
  float low, high;
  uint32_t result;
  asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}\n"
      : "=f"(low), "=f"(high)
      : "r"(halves));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
#endif

// Four e4m3 codes to T, bytes 0 and 2 to `even`, 1 and 3 to `odd`.
template <class T>
__device__ __forceinline__ void widen_even_odd(uint32_t codes, uint32_t& even, uint32_t& odd);
// Bytes 0 and 1 to `low`, 2 and 3 to `high`.
template <class T>
__device__ __forceinline__ void widen_low_high(uint32_t codes, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ < 890
  widen_even_odd<T>(__byte_perm(codes, 0, 0x3120), low, high);
#else
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}\n"
      : "=r"(low), "=r"(high)
      : "r"(codes));
  low = widened<T>(low), high = widened<T>(high);
#endif
}
template <class T>
__device__ __forceinline__ void widen_even_odd(uint32_t codes, uint32_t& even, uint32_t& odd) {
#if __CUDA_ARCH__ < 890
  constexpr bool kWide = cuda::std::is_same_v<T, __nv_bfloat16>;
  constexpr uint32_t kMask = kWide ? 0x07f007f0u : 0x3f803f80u;
  even = widened<T>(codes << (kWide ? 4 : 7) & kMask, codes << 8);
  odd = widened<T>(codes >> (kWide ? 4 : 1) & kMask, codes);
#else
  widen_low_high<T>(__byte_perm(codes, 0, 0x3120), even, odd);
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ---- Clusters and programmatic dependent launch: sm_90; below, the planner asks for neither -------------------------

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// Every thread of every block of the cluster arrives (release), then waits (acquire).
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#endif
}
// The same without a release: for the barrier behind which nobody reads what was written before it. The release is a
// fence of the whole GPU.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#endif
}
// The same place in the shared memory of block `rank` of the cluster, as a generic pointer.
template <class T>
__device__ __forceinline__ T* cluster_map(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;\n" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return p;
#endif
}

// Waits until the grids this launch depends on have finished and their writes are visible.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
// Lets the dependent grid start its prologue while this one still runs.
__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace nsa_sel::dev

#endif  // NSA_SEL_HOST_RUN

namespace nsa_sel::dev {

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

// Two floats to one register of two 16-bit values, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return uint32_t(__bfloat16_as_ushort(v.x)) | uint32_t(__bfloat16_as_ushort(v.y)) << 16;
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return uint32_t(__half_as_ushort(v.x)) | uint32_t(__half_as_ushort(v.y)) << 16;
}

}  // namespace nsa_sel::dev

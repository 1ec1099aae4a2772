// host_primitives.h - the CUDA built-ins and the primitives of the kernel, for a kernel compiled as plain C++17 by g++.
// Each forwards to the emulator with the place in the source that used it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "device_api.h"

// The toolkit's headers leave some of these as attributes that g++ does not know.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__
#undef __restrict__
#define __restrict__ __restrict

#define threadIdx (::nsa_sel::emu::current_context->thread)
#define blockIdx (::nsa_sel::emu::current_context->block)
#define blockDim (::nsa_sel::emu::current_context->block_dim)
#define gridDim (::nsa_sel::emu::current_context->grid_dim)

// ---- CUDA built-ins -------------------------------------------------------------------------------------------------

inline void __syncthreads(::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  ::nsa_sel::emu::barrier_sync(0, 0, site);
}
inline void __syncwarp(unsigned mask = ~0u, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  ::nsa_sel::emu::warp_sync(mask, site);
}
inline void __threadfence(::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  ::nsa_sel::emu::thread_fence(site);
}
[[noreturn]] inline void __trap(::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  ::nsa_sel::emu::trap(site);
}

namespace nsa_sel::emu {

template <class T>
inline T shuffle_value(Shuffle kind, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, argument, width, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace nsa_sel::emu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                     ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return ::nsa_sel::emu::shuffle_value(::nsa_sel::emu::Shuffle::kIndex, mask, value, lane, width, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return ::nsa_sel::emu::shuffle_value(::nsa_sel::emu::Shuffle::kXor, mask, value, lane_mask, width, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return ::nsa_sel::emu::shuffle_value(::nsa_sel::emu::Shuffle::kUp, mask, value, int(delta), width, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return ::nsa_sel::emu::shuffle_value(::nsa_sel::emu::Shuffle::kDown, mask, value, int(delta), width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return ::nsa_sel::emu::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return ::nsa_sel::emu::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return ::nsa_sel::emu::ballot(mask, predicate == 0, site) == 0;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value,
                                  ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step, 32, site);
  return value;
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  for (int step = 16; step > 0; step /= 2) value |= __shfl_xor_sync(mask, value, step, 32, site);
  return value;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                  ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  for (int step = 16; step > 0; step /= 2) {
    const unsigned other = __shfl_xor_sync(mask, value, step, 32, site);
    value = value < other ? other : value;
  }
  return value;
}

inline unsigned atomicAdd(unsigned* p, unsigned v, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return unsigned(::nsa_sel::emu::atomic(::nsa_sel::emu::Atomic::kAdd32, p, v, 0, site));
}
inline int atomicAdd(int* p, int v, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return int(::nsa_sel::emu::atomic(::nsa_sel::emu::Atomic::kAdd32, p, unsigned(v), 0, site));
}
inline float atomicAdd(float* p, float v, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = uint32_t(::nsa_sel::emu::atomic(::nsa_sel::emu::Atomic::kAddFloat, p, bits, 0, site));
  std::memcpy(&v, &bits, 4);
  return v;
}
inline unsigned atomicInc(unsigned* p, unsigned v, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return unsigned(::nsa_sel::emu::atomic(::nsa_sel::emu::Atomic::kInc32, p, v, 0, site));
}
inline unsigned atomicExch(unsigned* p, unsigned v, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return unsigned(::nsa_sel::emu::atomic(::nsa_sel::emu::Atomic::kExchange32, p, v, 0, site));
}
inline int atomicMax(int* p, int v, ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return int(::nsa_sel::emu::atomic(::nsa_sel::emu::Atomic::kMax32, p, unsigned(v), 0, site));
}
inline unsigned atomicCAS(unsigned* p, unsigned compare, unsigned v,
                          ::nsa_sel::emu::Site site = ::nsa_sel::emu::Site::here()) {
  return unsigned(::nsa_sel::emu::atomic(::nsa_sel::emu::Atomic::kCompareSwap32, p, v, compare, site));
}

// Overloads for the pairs of types that device code mixes; not templates, so that `using std::min` stays harmless.
#define NSA_SEL_HOST_MIN_MAX(A, B, R)                                                                              \
  inline R min(A a, B b) { return static_cast<R>(b) < static_cast<R>(a) ? static_cast<R>(b) : static_cast<R>(a); } \
  inline R max(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(b) : static_cast<R>(a); }
NSA_SEL_HOST_MIN_MAX(int, int, int)
NSA_SEL_HOST_MIN_MAX(unsigned, unsigned, unsigned)
NSA_SEL_HOST_MIN_MAX(int, unsigned, unsigned)
NSA_SEL_HOST_MIN_MAX(unsigned, int, unsigned)
NSA_SEL_HOST_MIN_MAX(long, long, long)
NSA_SEL_HOST_MIN_MAX(unsigned long, unsigned long, unsigned long)
NSA_SEL_HOST_MIN_MAX(long long, long long, long long)
NSA_SEL_HOST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
NSA_SEL_HOST_MIN_MAX(float, float, float)
NSA_SEL_HOST_MIN_MAX(double, double, double)
#undef NSA_SEL_HOST_MIN_MAX

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <class To, class From>
inline To nsa_sel_host_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
inline unsigned __float_as_uint(float x) { return nsa_sel_host_bits<unsigned>(x); }
inline int __float_as_int(float x) { return nsa_sel_host_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return nsa_sel_host_bits<float>(x); }
inline float __int_as_float(int x) { return nsa_sel_host_bits<float>(x); }

// ---- The primitives of primitives.cuh -------------------------------------------------------------------------------

// On the device this declares the dynamic shared memory; here every region is carved out of the block's own arena.
#define NSA_SEL_DYNAMIC_SMEM(name) unsigned char* const name = nullptr

namespace nsa_sel::dev {

using emu::Site;
using std::size_t;

template <class T>
inline T* smem_at(const unsigned char* base, size_t byte_offset, size_t count, const char* label,
                  Site site = Site::here()) {
  // The base is null, so a caller's `base + n` still reaches the emulator as an offset.
  const size_t offset = reinterpret_cast<uintptr_t>(base) + byte_offset;
  return static_cast<T*>(emu::carve_shared(offset, count * sizeof(T), label, site));
}

constexpr bool kKeepByDefault = true;
template <bool kKept = kKeepByDefault, class T>
inline T keep(T x) {
  return x;
}

template <class T>
inline T load(const T* p, Site site = Site::here()) {
  static_assert(std::is_trivially_copyable_v<T>, "a load copies bits");
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "access width");
  T value;
  emu::load(&value, p, sizeof value, site);
  return value;
}
template <class T>
inline void store(T* p, const T& value, Site site = Site::here()) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "access width");
  emu::store(p, &value, sizeof value, site);
}

inline void cp_async_16(void* dst, const void* src, bool valid, Site site = Site::here()) {
  emu::cp_async(dst, src, 16, valid, site);
}
inline void cp_async_4(void* dst, const void* src, bool valid, Site site = Site::here()) {
  emu::cp_async(dst, src, 4, valid, site);
}
template <int kDstOffset, int kSrcOffset>
inline void cp_async_16_at(void* dst, const void* src, bool valid, Site site = Site::here()) {
  emu::cp_async(static_cast<unsigned char*>(dst) + kDstOffset, static_cast<const unsigned char*>(src) + kSrcOffset, 16,
                valid, site);
}
inline void cp_async_arrive(uint64_t* barrier, Site site = Site::here()) { emu::cp_async_arrive(barrier, site); }
inline void cp_async_wait_all(Site site = Site::here()) { emu::cp_async_wait_all(site); }

inline void mbarrier_init(uint64_t* barrier, uint32_t count, Site site = Site::here()) {
  emu::mbarrier_init(barrier, count, site);
}
inline void mbarrier_arrive(uint64_t* barrier, Site site = Site::here()) { emu::mbarrier_arrive(barrier, site); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes, Site site = Site::here()) {
  emu::mbarrier_arrive_expect_tx(barrier, bytes, site);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::here()) {
  emu::mbarrier_wait(barrier, parity, site);
}
inline void bulk_copy_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* barrier, Site site = Site::here()) {
  emu::bulk_copy_g2s(dst, src, bytes, barrier, site);
}
inline void fence_barrier_init(Site site = Site::here()) { emu::fence_barrier_init(site); }
inline void fence_proxy_async(Site site = Site::here()) { emu::fence_proxy_async(site); }

inline void named_barrier_sync(int id, int threads, Site site = Site::here()) { emu::barrier_sync(id, threads, site); }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emu::ldmatrix_x4(r, false, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emu::ldmatrix_x4(r, true, row, site);
}
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit operands");
  emu::mma_m16n8k16(d, a, b0, b1, std::is_same_v<T, __nv_bfloat16>, site);
}
inline uint32_t movmatrix_trans(uint32_t value, Site site = Site::here()) { return emu::movmatrix_trans(value, site); }

// A float8_e4m3fn code by the format's definition: 4 exponent bits of bias 7, 3 mantissa bits, no infinity, NaN in the
// last code of each sign.
inline float e4m3_value(unsigned code) {
  const int exponent = int(code >> 3 & 15), mantissa = int(code & 7);
  const float magnitude = (code & 0x7f) == 0x7f ? std::nanf("")
                          : exponent == 0       ? std::ldexp(float(mantissa), -9)
                                                : std::ldexp(float(8 + mantissa), exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}
template <class T>
uint32_t pack2(float low, float high);  // of primitives.cuh
template <class T>
inline void widen_low_high(uint32_t codes, uint32_t& low, uint32_t& high) {
  low = pack2<T>(e4m3_value(codes & 0xff), e4m3_value(codes >> 8 & 0xff));
  high = pack2<T>(e4m3_value(codes >> 16 & 0xff), e4m3_value(codes >> 24));
}
template <class T>
inline void widen_even_odd(uint32_t codes, uint32_t& even, uint32_t& odd) {
  even = pack2<T>(e4m3_value(codes & 0xff), e4m3_value(codes >> 16 & 0xff));
  odd = pack2<T>(e4m3_value(codes >> 8 & 0xff), e4m3_value(codes >> 24));
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;  // .ftz: a subnormal result is 0
}

inline unsigned cluster_rank() { return emu::cluster_rank(); }
inline unsigned cluster_size() { return emu::cluster_size(); }
inline void cluster_arrive(Site site = Site::here()) { emu::cluster_arrive(site); }
inline void cluster_arrive_relaxed(Site site = Site::here()) { emu::cluster_arrive(site); }
inline void cluster_wait(Site site = Site::here()) { emu::cluster_wait(site); }
template <class T>
inline T* cluster_map(T* p, unsigned rank, Site site = Site::here()) {
  return static_cast<T*>(emu::cluster_map(const_cast<std::remove_const_t<T>*>(p), rank, site));
}
inline void grid_dependency_wait(Site site = Site::here()) { emu::grid_dependency_wait(site); }
inline void grid_launch_dependents(Site site = Site::here()) { emu::grid_launch_dependents(site); }

}  // namespace nsa_sel::dev

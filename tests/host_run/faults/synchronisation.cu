// synchronisation.cu - barriers, warp collectives, and blocks of one grid that touch the same words.
#include "fault.h"

namespace nsa_sel::faults {

template <bool kFault>
__global__ void missing_syncthreads(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  a[t] = p.in[t];
  if (!kFault) __syncthreads();
  p.out[t] = a[127 - t];
}

template <bool kFault>
__global__ void missing_syncthreads_before_reuse(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  float sum = 0.0f;
  for (int i = 0; i < 3; ++i) {
    dev::store(a + t, dev::load(p.in + i * 128 + t));
    __syncthreads();
    sum += dev::load(a + (127 - t));
    if (!kFault) __syncthreads();
  }
  dev::store(p.out + t, sum);
}

template <bool kFault>
__global__ void missing_syncwarp(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  a[t] = p.in[t];
  if (!kFault) __syncwarp();
  p.out[t] = a[t ^ 1];
}

// A shuffle makes lanes meet but orders none of their memory accesses.
template <bool kFault>
__global__ void shuffle_is_no_fence(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  dev::store(a + t, 1.0f);
  const int other = __shfl_xor_sync(~0u, t, 1);
  if (!kFault) __syncwarp();
  dev::store(p.out + t, dev::load(a + other));
}

template <bool kFault>
__global__ void divergent_barrier(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (kFault && t < 32) {
    dev::store(p.out + t, 0.0f);
    __syncthreads();  // the same count of barriers, but not the same barrier
  } else {
    __syncthreads();
  }
  dev::store(p.out + t, 1.0f);
}

template <bool kFault>
__global__ void half_warp_barrier(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (!kFault || (t & 31) < 16) __syncthreads();
  dev::store(p.out + t, 1.0f);
  if (kFault) __syncwarp();  // the other half waits here for lanes that are in the barrier
}

template <bool kFault>
__global__ void divergent_shuffle(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  float x = dev::load(p.in + t);
  if (!kFault || (t & 31) < 16) x += __shfl_xor_sync(~0u, x, 1);
  dev::store(p.out + t, x);
}

template <bool kFault>
__global__ void exited_lanes(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (kFault && (t & 31) >= 16) return;
  float x = dev::load(p.in + t);
  x += __shfl_xor_sync(~0u, x, 8);
  dev::store(p.out + t, x);
}

template <bool kFault>
__global__ void lane_outside_mask(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  const unsigned votes = __ballot_sync(kFault ? 0x7fffffffu : ~0u, t & 1);
  dev::store(p.out + t, float(votes));
}

template <bool kFault>
__global__ void divergent_mma(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  float d[4] = {};
  const uint32_t a[4] = {};
  if (kFault && t < 16) {
    dev::mma_m16n8k16<__half>(d, a, 0, 0);
  } else {
    dev::mma_m16n8k16<__half>(d, a, 0, 0);
  }
  dev::store(p.out + t, d[0]);
}

// Two warps exchange through a barrier of their own; told 128, it waits for warps that never come.
template <bool kFault>
__global__ void named_barrier_deadlock(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 64, "a");
  const int t = int(threadIdx.x);
  if (t >= 64) return;
  dev::store(a + t, 1.0f);
  dev::named_barrier_sync(1, kFault ? 128 : 64);
  dev::store(p.out + t, dev::load(a + 63 - t));
}

// Told 32, each warp passes alone.
template <bool kFault>
__global__ void named_barrier_too_small(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 64, "a");
  const int t = int(threadIdx.x);
  dev::store(a + t, 1.0f);
  dev::named_barrier_sync(1, kFault ? 32 : 64);
  dev::store(p.out + t, dev::load(a + 63 - t));
}

// 64 threads come, but as halves of four warps: the hardware counts warps.
template <bool kFault>
__global__ void named_barrier_half_warps(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (kFault ? (t & 31) < 16 : t < 64) dev::named_barrier_sync(1, 64);
  __syncwarp();
  dev::store(p.out + t, 1.0f);
}

// The two pairs of warps must not share a barrier.
template <bool kFault>
__global__ void named_barrier_disagreement(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  dev::named_barrier_sync(1, kFault && t >= 64 ? 128 : 64);
  dev::store(p.out + t, 1.0f);
}

template <bool kFault>
__global__ void block_races(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x), block = int(blockIdx.x);
  dev::store(p.out + t + (kFault ? 0 : block * 128), float(block));
}

template <bool kFault>
__global__ void reads_other_block(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x), block = int(blockIdx.x);
  dev::store(p.scratch + block * 128 + t, 1.0f);
  const int other = kFault ? 1 - block : block;
  dev::store(p.out + block * 128 + t, dev::load(p.scratch + other * 128 + t));
}

// The last block adds up what all wrote: fence, count, and fence again.
template <bool kFault>
__global__ void last_block_reduces(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  unsigned* ticket = dev::smem_at<unsigned>(raw, 0, 1, "ticket");
  const int t = int(threadIdx.x), blocks = int(gridDim.x);
  dev::store(p.scratch + int(blockIdx.x) * 128 + t, 1.0f);
  if (!kFault) __threadfence();
  __syncthreads();
  if (t == 0) {
    dev::store(ticket, atomicAdd(p.counter, 1u));
    __threadfence();
  }
  __syncthreads();
  if (dev::load(ticket) != unsigned(blocks - 1)) return;
  float sum = 0.0f;
  for (int b = 0; b < blocks; ++b) sum += dev::load(p.scratch + b * 128 + t);
  dev::store(p.out + t, sum);
}

template <bool kFault>
__global__ void global_race_in_block(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  dev::store(p.scratch + t, 1.0f);
  if (!kFault) __syncthreads();
  dev::store(p.out + t, dev::load(p.scratch + 127 - t));
}

template <bool kFault>
__global__ void endless(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  float x = 0.0f;
  for (int i = 0; kFault || i < 3; ++i) x += dev::load(p.in + t);
  dev::store(p.out + t, x);
}

}  // namespace nsa_sel::faults

NSA_SEL_FAULT(missing_syncthreads)
NSA_SEL_FAULT(missing_syncthreads_before_reuse)
NSA_SEL_FAULT(missing_syncwarp)
NSA_SEL_FAULT(shuffle_is_no_fence)
NSA_SEL_FAULT(divergent_barrier)
NSA_SEL_FAULT(half_warp_barrier)
NSA_SEL_FAULT(divergent_shuffle)
NSA_SEL_FAULT(exited_lanes)
NSA_SEL_FAULT(lane_outside_mask)
NSA_SEL_FAULT(divergent_mma, 1, 32)
NSA_SEL_FAULT(named_barrier_deadlock)
NSA_SEL_FAULT(named_barrier_too_small, 1, 64)
NSA_SEL_FAULT(named_barrier_half_warps)
NSA_SEL_FAULT(named_barrier_disagreement)
NSA_SEL_FAULT(block_races, 2)
NSA_SEL_FAULT(reads_other_block, 2)
NSA_SEL_FAULT(last_block_reduces, 3)
NSA_SEL_FAULT(global_race_in_block)
NSA_SEL_FAULT(endless)

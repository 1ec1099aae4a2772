// copies.cu - asynchronous copies and the mbarriers that announce them.
#include "fault.h"

namespace nsa_sel::faults {

template <bool kFault>
__global__ void cp_async_without_wait(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  if (t < 32) {
    dev::cp_async_16(a + t * 4, p.in + t * 4, true);
    if (!kFault) dev::cp_async_wait_all();
  }
  __syncthreads();
  dev::store(p.out + t, dev::load(a + t));
}

// The wait of one thread says nothing to the others until they synchronise with it.
template <bool kFault>
__global__ void cp_async_wait_without_barrier(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  dev::cp_async_16(a + t * 4, p.in + t * 4, true);
  dev::cp_async_wait_all();
  if (!kFault) __syncwarp();
  dev::store(p.out + t, dev::load(a + (t ^ 1) * 4));
}

template <bool kFault>
__global__ void cp_async_at_exit(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  dev::cp_async_16(a + t * 4, p.in + t * 4, true);
  if (!kFault) dev::cp_async_wait_all();
}

// The pipeline of the kernel in small: warp 0 fills a ring of two slots, warp 1 adds them up.
enum class Ring {
  kRight,
  kNoFullWait,
  kWrongParity,
  kNoEmptyWait,
  kNoSyncwarp,
  kPlainArrival,
  kCountTooHigh,
  kCountTooLow
};

template <Ring kRing>
__device__ __forceinline__ void ring(const Params& p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* slots = dev::smem_at<float>(raw, 0, 2 * 128, "slots");
  uint64_t* full = dev::smem_at<uint64_t>(raw, 1024, 2, "full");
  uint64_t* empty = dev::smem_at<uint64_t>(raw, 1040, 2, "empty");
  const int t = int(threadIdx.x), warp = t >> 5, lane = t & 31;
  constexpr int kTiles = 6;
  if (t == 0) {
    for (int s = 0; s < 2; ++s) {
      dev::mbarrier_init(full + s, kRing == Ring::kCountTooHigh ? 33 : kRing == Ring::kCountTooLow ? 16 : 32);
      dev::mbarrier_init(empty + s, 1);
    }
  }
  __syncthreads();
  if (warp == 0) {
    for (int i = 0; i < kTiles; ++i) {
      const int s = i & 1;
      const uint32_t phase = uint32_t(i >> 1) & 1;
      if (kRing != Ring::kNoEmptyWait) dev::mbarrier_wait(empty + s, phase ^ 1);
      dev::cp_async_16(slots + s * 128 + lane * 4, p.in + i * 128 + lane * 4, true);
      if (kRing == Ring::kPlainArrival) {
        dev::mbarrier_arrive(full + s);
      } else {
        dev::cp_async_arrive(full + s);
      }
    }
    dev::cp_async_wait_all();
  } else {
    float sum = 0.0f;
    for (int i = 0; i < kTiles; ++i) {
      const int s = i & 1;
      const uint32_t phase = uint32_t(i >> 1) & 1;
      if (kRing != Ring::kNoFullWait) dev::mbarrier_wait(full + s, kRing == Ring::kWrongParity ? phase ^ 1 : phase);
      sum += dev::load(slots + s * 128 + lane) + dev::load(slots + s * 128 + 127 - lane);
      if (kRing != Ring::kNoSyncwarp) __syncwarp();
      if (lane == 0) dev::mbarrier_arrive(empty + s);
    }
    dev::store(p.out + lane, sum);
  }
}

#define RING_FAULT(name, kind)                             \
  template <bool kFault>                                   \
  __global__ void name(const __grid_constant__ Params p) { \
    ring<kFault ? Ring::kind : Ring::kRight>(p);           \
  }
RING_FAULT(ring_no_full_wait, kNoFullWait)
RING_FAULT(ring_wrong_parity, kWrongParity)
RING_FAULT(ring_no_empty_wait, kNoEmptyWait)
RING_FAULT(ring_no_syncwarp, kNoSyncwarp)
RING_FAULT(ring_plain_arrival, kPlainArrival)
RING_FAULT(ring_count_too_high, kCountTooHigh)
RING_FAULT(ring_count_too_low, kCountTooLow)
#undef RING_FAULT

// Two copies, each announced on a barrier of its own; the wait for one says nothing of the other.
template <bool kFault>
__global__ void waits_for_other_copy(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* tiles = dev::smem_at<float>(raw, 0, 256, "tiles");
  uint64_t* full = dev::smem_at<uint64_t>(raw, 1024, 2, "full");
  const int t = int(threadIdx.x), lane = t & 31;
  if (t == 0) {
    dev::mbarrier_init(full, 32);
    dev::mbarrier_init(full + 1, 32);
  }
  __syncthreads();
  if (t < 32) {
    for (int i = 0; i < 2; ++i) {
      dev::cp_async_16(tiles + i * 128 + lane * 4, p.in + i * 128 + lane * 4, true);
      dev::cp_async_arrive(full + i);
    }
    dev::cp_async_wait_all();
  } else {
    dev::mbarrier_wait(full, 0);
    dev::store(p.out + lane, dev::load(tiles + (kFault ? 128 : 0) + lane));
  }
}

// The writer has begun the barrier's next phase; a wait for the finished one does not cover what came after it.
template <bool kFault>
__global__ void waits_for_earlier_phase(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 1, "a");
  uint64_t* bar = dev::smem_at<uint64_t>(raw, 16, 1, "bar");
  const int t = int(threadIdx.x);
  if (t == 0) dev::mbarrier_init(bar, 2);
  __syncthreads();
  if (t == 0) {
    dev::mbarrier_arrive(bar);
    if (!kFault) dev::store(a, 1.0f);
    dev::mbarrier_arrive(bar);
    if (kFault) dev::store(a, 1.0f);
    dev::mbarrier_arrive(bar);
  } else if (t >= 32) {
    dev::mbarrier_wait(bar, 0);
    dev::store(p.out + t, dev::load(a));
  }
}

// Two phases pass without an answer: a waiter that was not scheduled in between has missed the one it waits for.
template <bool kFault>
__global__ void phase_missed(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint64_t* bars = dev::smem_at<uint64_t>(raw, 0, 2, "bars");
  const int t = int(threadIdx.x);
  if (t == 0) {
    dev::mbarrier_init(bars, 1);
    dev::mbarrier_init(bars + 1, 32);
  }
  __syncthreads();
  if (t == 0) {
    dev::mbarrier_arrive(bars);
    if (!kFault) dev::mbarrier_wait(bars + 1, 0);
    dev::mbarrier_arrive(bars);
  } else if (t >= 32) {
    dev::mbarrier_wait(bars, 0);
    dev::mbarrier_arrive(bars + 1);
  }
}

template <bool kFault>
__global__ void mbarrier_not_initialised(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint64_t* bars = dev::smem_at<uint64_t>(raw, 0, 2, "bars");
  const int t = int(threadIdx.x);
  if (t == 0) dev::mbarrier_init(bars, 32);
  __syncwarp();
  dev::mbarrier_arrive(bars + (kFault ? 1 : 0));
  dev::store(p.out + t, 1.0f);
}

template <bool kFault>
__global__ void mbarrier_init_not_ordered(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint64_t* bars = dev::smem_at<uint64_t>(raw, 0, 1, "bars");
  const int t = int(threadIdx.x);
  if (t == 0) dev::mbarrier_init(bars, 64);
  if (kFault) {
    __syncwarp();  // the other warp may come first
  } else {
    __syncthreads();
  }
  dev::mbarrier_arrive(bars);
  dev::mbarrier_wait(bars, 0);
  dev::store(p.out + t, 1.0f);
}

template <bool kFault>
__global__ void mbarrier_initialised_twice(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint64_t* bars = dev::smem_at<uint64_t>(raw, 0, 1, "bars");
  const int t = int(threadIdx.x);
  if (t == 0) dev::mbarrier_init(bars, 32);
  __syncwarp();
  dev::mbarrier_arrive(bars);
  dev::mbarrier_wait(bars, 0);
  __syncwarp();
  if (kFault && t == 0) dev::mbarrier_init(bars, 32);
  dev::store(p.out + t, 1.0f);
}

template <bool kFault>
__global__ void mbarrier_overwritten(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint64_t* bars = dev::smem_at<uint64_t>(raw, 0, 1, "bars");
  float* a = dev::smem_at<float>(raw, 16, 32, "a");
  const int t = int(threadIdx.x);
  if (t == 0) dev::mbarrier_init(bars, 32);
  __syncwarp();
  if (t == 1) dev::store(kFault ? reinterpret_cast<float*>(bars) : a, 0.0f);
  dev::store(p.out + t, 1.0f);
}

enum class Bulk { kRight, kNoWait, kWrongBytes, kNoInitFence, kNoProxyFence, kTooManyArrivals, kLostAtExit };

template <Bulk kBulk>
__device__ __forceinline__ void bulk(const Params& p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  uint64_t* full = dev::smem_at<uint64_t>(raw, 512, 1, "full");
  const int t = int(threadIdx.x);
  dev::store(a + t, 0.0f);
  if (kBulk != Bulk::kNoProxyFence) dev::fence_proxy_async();
  if (t == 0) {
    dev::mbarrier_init(full, 1);
    if (kBulk != Bulk::kNoInitFence) dev::fence_barrier_init();
  }
  __syncthreads();
  if (t == 0) {
    dev::mbarrier_arrive_expect_tx(full, kBulk == Bulk::kWrongBytes ? 528 : 512);
    if (kBulk == Bulk::kTooManyArrivals) dev::mbarrier_arrive(full);
    dev::bulk_copy_g2s(a, p.in, 512, full);
  }
  if (kBulk == Bulk::kLostAtExit) return;
  if (kBulk != Bulk::kNoWait) dev::mbarrier_wait(full, 0);
  dev::store(p.out + t, dev::load(a + t));
}

#define BULK_FAULT(name, kind)                             \
  template <bool kFault>                                   \
  __global__ void name(const __grid_constant__ Params p) { \
    bulk<kFault ? Bulk::kind : Bulk::kRight>(p);           \
  }
BULK_FAULT(bulk_no_wait, kNoWait)
BULK_FAULT(bulk_wrong_bytes, kWrongBytes)
BULK_FAULT(bulk_no_init_fence, kNoInitFence)
BULK_FAULT(bulk_no_proxy_fence, kNoProxyFence)
BULK_FAULT(bulk_too_many_arrivals, kTooManyArrivals)
BULK_FAULT(bulk_lost_at_exit, kLostAtExit)
#undef BULK_FAULT

}  // namespace nsa_sel::faults

NSA_SEL_FAULT(cp_async_without_wait)
NSA_SEL_FAULT(cp_async_wait_without_barrier, 1, 32)
NSA_SEL_FAULT(cp_async_at_exit, 1, 32)
NSA_SEL_FAULT(ring_no_full_wait, 1, 64)
NSA_SEL_FAULT(ring_wrong_parity, 1, 64)
NSA_SEL_FAULT(ring_no_empty_wait, 1, 64)
NSA_SEL_FAULT(ring_no_syncwarp, 1, 64)
NSA_SEL_FAULT(ring_plain_arrival, 1, 64)
NSA_SEL_FAULT(ring_count_too_high, 1, 64)
NSA_SEL_FAULT(ring_count_too_low, 1, 64)
NSA_SEL_FAULT(waits_for_other_copy, 1, 64)
NSA_SEL_FAULT(waits_for_earlier_phase, 1, 64)
NSA_SEL_FAULT(phase_missed, 1, 64)
NSA_SEL_FAULT(mbarrier_not_initialised, 1, 32)
NSA_SEL_FAULT(mbarrier_init_not_ordered, 1, 64)
NSA_SEL_FAULT(mbarrier_initialised_twice, 1, 32)
NSA_SEL_FAULT(mbarrier_overwritten, 1, 32)
NSA_SEL_FAULT(bulk_no_wait)
NSA_SEL_FAULT(bulk_wrong_bytes)
NSA_SEL_FAULT(bulk_no_init_fence)
NSA_SEL_FAULT(bulk_no_proxy_fence)
NSA_SEL_FAULT(bulk_too_many_arrivals)
NSA_SEL_FAULT(bulk_lost_at_exit)

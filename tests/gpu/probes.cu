// probes.cu - one tiny kernel for each device primitive, compiled twice: by nvcc for the GPU and by g++ for the
// emulator. `twins.py` gives both the same bits and compares what they return. Each takes 32 lanes of one warp unless
// it says more.
#include <cstdint>

#include "launch.cuh"
#include "primitives.cuh"

namespace nsa_sel::probes {

struct Words {
  const uint32_t* a;
  const uint32_t* b;
  uint32_t* out;
  int mode;
};

// a: 128 words, four 8x8 matrices of 16-bit values, a row in 4 words. out: 4 words a lane. mode 1: transposed.
__global__ void ldmatrix(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint4* rows = dev::smem_at<uint4>(raw, 0, 32, "rows");
  const int lane = int(threadIdx.x);
  dev::store(rows + lane, dev::load(reinterpret_cast<const uint4*>(p.a) + lane));
  __syncwarp();
  uint32_t r[4];
  if (p.mode) {
    dev::ldmatrix_x4_trans(r, rows + lane);
  } else {
    dev::ldmatrix_x4(r, rows + lane);
  }
  for (int i = 0; i < 4; ++i) dev::store(p.out + lane * 4 + i, r[i]);
}

// a: 4 words a lane (A), b: 2 words a lane (B) and behind these 4 floats a lane (C). out: 4 floats a lane.
template <class T>
__device__ __forceinline__ void mma_of(const Words& p) {
  const int lane = int(threadIdx.x);
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = dev::load(p.a + lane * 4 + i);
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(dev::load(p.b + 64 + lane * 4 + i));
  dev::mma_m16n8k16<T>(d, a, dev::load(p.b + lane * 2), dev::load(p.b + lane * 2 + 1));
  for (int i = 0; i < 4; ++i) dev::store(p.out + lane * 4 + i, uint32_t(__float_as_uint(d[i])));
}
__global__ void mma(const __grid_constant__ Words p) {
  if (p.mode) {
    mma_of<__nv_bfloat16>(p);
  } else {
    mma_of<__half>(p);
  }
}

__global__ void movmatrix(const __grid_constant__ Words p) {
  const int lane = int(threadIdx.x);
  dev::store(p.out + lane, dev::movmatrix_trans(dev::load(p.a + lane)));
}

// a: 256 floats. out: 2^a.
__global__ void exp2(const __grid_constant__ Words p) {
  for (int i = int(threadIdx.x); i < 256; i += 32) {
    dev::store(p.out + i, uint32_t(__float_as_uint(dev::exp2_approx(__uint_as_float(dev::load(p.a + i))))));
  }
}

// a, b: 128 floats each. out: pairs packed to 16 bits. mode 1: bf16.
__global__ void pack(const __grid_constant__ Words p) {
  for (int i = int(threadIdx.x); i < 128; i += 32) {
    const float low = __uint_as_float(dev::load(p.a + i)), high = __uint_as_float(dev::load(p.b + i));
    dev::store(p.out + i, p.mode ? dev::pack2<__nv_bfloat16>(low, high) : dev::pack2<__half>(low, high));
  }
}

// 16 bytes a lane to shared memory; b says which lanes are valid, the others get zeros over what was there.
__global__ void cp_async(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint4* rows = dev::smem_at<uint4>(raw, 0, 32, "rows");
  const int lane = int(threadIdx.x);
  dev::store(rows + lane, uint4{7, 7, 7, 7});
  __syncwarp();
  dev::cp_async_16(rows + lane, p.a + lane * 4, dev::load(p.b + lane) != 0);
  dev::cp_async_wait_all();
  __syncwarp();
  const uint4 got = dev::load(rows + (31 - lane));
  dev::store(reinterpret_cast<uint4*>(p.out) + lane, got);
}

// Two warps: one fills two slots in turn by cp.async, the other drains them, over eight rounds of both parities.
__global__ void mbarrier(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint4* slots = dev::smem_at<uint4>(raw, 0, 64, "slots");
  uint64_t* full = dev::smem_at<uint64_t>(raw, 1024, 2, "full");
  uint64_t* empty = dev::smem_at<uint64_t>(raw, 1040, 2, "empty");
  const int lane = int(threadIdx.x) & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      dev::mbarrier_init(full + i, 32);
      dev::mbarrier_init(empty + i, 1);
    }
  }
  __syncthreads();
  for (int round = 0; round < 8; ++round) {
    const int slot = round & 1, parity = (round >> 1) & 1;
    if (threadIdx.x < 32) {
      dev::mbarrier_wait(empty + slot, uint32_t(parity ^ 1));
      dev::cp_async_16(slots + slot * 32 + lane, p.a + (round * 32 + lane) * 4, true);
      dev::cp_async_arrive(full + slot);
    } else {
      dev::mbarrier_wait(full + slot, uint32_t(parity));
      const uint4 got = dev::load(slots + slot * 32 + (lane ^ 5));
      dev::store(reinterpret_cast<uint4*>(p.out) + round * 32 + lane, got);
      __syncwarp();
      if (lane == 0) dev::mbarrier_arrive(empty + slot);
    }
  }
  if (threadIdx.x < 32) dev::cp_async_wait_all();
}

// Four warps in two named barriers of 64 threads: each half reads what the other warp of its half wrote.
__global__ void named_barrier(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint32_t* words = dev::smem_at<uint32_t>(raw, 0, 128, "words");
  const int t = int(threadIdx.x);
  dev::store(words + t, dev::load(p.a + t) * 3u);
  dev::named_barrier_sync(1 + t / 64, 64);
  dev::store(p.out + t, dev::load(words + (t ^ 32)));
}

// sm_90: 512 bytes by the copy engine in two pieces.
__global__ void bulk_copy(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint4* rows = dev::smem_at<uint4>(raw, 0, 32, "rows");
  uint64_t* full = dev::smem_at<uint64_t>(raw, 512, 1, "full");
  const int lane = int(threadIdx.x);
  if (lane == 0) {
    dev::mbarrier_init(full, 1);
    dev::fence_barrier_init();
    dev::mbarrier_arrive_expect_tx(full, 512);
    dev::bulk_copy_g2s(rows, p.a, 128, full);
    dev::bulk_copy_g2s(rows + 8, p.a + 32, 384, full);
  }
  __syncwarp();
  dev::mbarrier_wait(full, 0);
  dev::store(reinterpret_cast<uint4*>(p.out) + lane, dev::load(rows + (lane ^ 9)));
}

// sm_90, a cluster of four blocks: every block reads the words of the next one.
__global__ void cluster(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint32_t* words = dev::smem_at<uint32_t>(raw, 0, 32, "words");
  const int lane = int(threadIdx.x);
  const unsigned rank = dev::cluster_rank();
  dev::store(words + lane, dev::load(p.a + rank * 32 + unsigned(lane)));
  dev::cluster_arrive();
  dev::cluster_wait();
  dev::store(p.out + rank * 32 + unsigned(lane), dev::load(dev::cluster_map(words + lane, (rank + 1) & 3u)));
  dev::cluster_arrive();  // nobody leaves while others still read its words
  dev::cluster_wait();
}

// Two grids in a row, the second launched early: it doubles what the first one wrote, in place.
__global__ void first_grid(const __grid_constant__ Words p) {
  dev::grid_launch_dependents();
  dev::store(p.out + threadIdx.x, dev::load(p.a + threadIdx.x) + 1u);
}
__global__ void second_grid(const __grid_constant__ Words p) {
  dev::grid_dependency_wait();
  dev::store(p.out + threadIdx.x, dev::load(p.out + threadIdx.x) * 2u);
}


}  // namespace nsa_sel::probes

using nsa_sel::dev::LaunchShape;
using nsa_sel::probes::Words;

#define NSA_SEL_PROBE(name, threads, blocks)                                                                         \
  extern "C" __attribute__((visibility("default"))) int probe_##name(const void* a, const void* b, void* out,        \
                                                                     int mode, void* stream) {                       \
    const Words words{static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), static_cast<uint32_t*>(out), \
                      mode};                                                                                         \
    return nsa_sel::dev::launch_kernel(nsa_sel::probes::name, LaunchShape{blocks, threads, 2048, blocks}, words,     \
                                       stream);                                                                      \
  }
NSA_SEL_PROBE(ldmatrix, 32, 1)
NSA_SEL_PROBE(mma, 32, 1)
NSA_SEL_PROBE(movmatrix, 32, 1)
NSA_SEL_PROBE(exp2, 32, 1)
NSA_SEL_PROBE(pack, 32, 1)
NSA_SEL_PROBE(cp_async, 32, 1)
NSA_SEL_PROBE(mbarrier, 64, 1)
NSA_SEL_PROBE(named_barrier, 128, 1)
NSA_SEL_PROBE(bulk_copy, 32, 1)
NSA_SEL_PROBE(cluster, 32, 4)
NSA_SEL_PROBE(first_grid, 128, 1)

extern "C" __attribute__((visibility("default"))) int probe_grid_pair(const void* a, const void* b, void* out, int mode,
                                                                      void* stream) {
  const int error = probe_first_grid(a, b, out, mode, stream);
  if (error != 0) return error;
  const Words words{static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), static_cast<uint32_t*>(out),
                    mode};
  return nsa_sel::dev::launch_kernel(nsa_sel::probes::second_grid, LaunchShape{1, 128, 0, 1, true}, words, stream);
}

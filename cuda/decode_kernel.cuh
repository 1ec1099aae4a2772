// decode_kernel.cuh - selection attention at decode: persistent blocks, three roles, one pipeline.
//
//   mapper   (1 warp)   selection -> row maps and Q, up to three segments ahead
//   loaders  (1 warp)   row maps -> K and V tiles into the ring, as far ahead as it has slots
//   consumers(4 warps)  K tiles -> logits -> max -> P; V tiles -> O; one write per item
//
// They meet only at mbarriers: map full/empty, slot full/empty, Q full/empty. Nobody waits in a circle: the maps of an
// item depend on free map slots alone (its Q comes behind its first map), tiles on maps and free slots, and consumers
// free both in order.
#pragma once
#include "consumer_output.cuh"
#include "loader.cuh"
#include "mapper.cuh"
#include "merge.cuh"

namespace nsa_sel {

// By one thread: on sm_90 the address of an initialisation is a uniform register, and lanes with barriers of their own
// would take turns.
template <class Traits>
__device__ __forceinline__ void init_barriers(const SharedViews<Traits>& smem) {
  if ((threadIdx.x & 31) != 0) return;
#pragma unroll
  for (int i = 0; i < Traits::kTile.max_slots; ++i) {
    dev::mbarrier_init(smem.slot_full + i, Traits::kBulk ? 1 : 32 * kLoaderWarps);  // cp.async: every lane arrives
    dev::mbarrier_init(smem.slot_empty + i, kConsumerWarps);
  }
#pragma unroll
  for (int i = 0; i < kMapSlots; ++i) {
#pragma unroll
    for (int t = 0; t < Traits::kTilesK; ++t) dev::mbarrier_init(smem.map_full + i * Traits::kTilesK + t, 1);
    dev::mbarrier_init(smem.map_empty + i, kLoaderWarps + kConsumerWarps);
    if constexpr (Traits::kFloat8) dev::mbarrier_init(smem.scales_full + i, 32);
  }
  dev::mbarrier_init(smem.q_full, 32);
  dev::mbarrier_init(smem.q_empty, kConsumerWarps);
  if constexpr (Traits::kBulk) dev::fence_barrier_init();  // the copy engine must see them as well
}

// The blocks of a cluster hold the splits of one row, one each and nothing else: every block merges its share of the
// columns from everybody's shared memory. All threads of the block take part.
template <class Traits>
__device__ __forceinline__ void cluster_combine(const DecodeParams& p, const SharedViews<Traits>& smem) {
  dev::cluster_arrive();
  dev::cluster_wait();  // every partial is written
  const ClusterPartial<Traits> own(smem, p.h);
  const int quads = p.h * Traits::kDv / 4;
  const int share = (quads + p.num_splits - 1) / p.num_splits;
  const int first = share * int(dev::cluster_rank());
  const int row = work_item(p, int(blockIdx.x)).row;
  for (int quad = first + int(threadIdx.x); quad < min(first + share, quads); quad += Traits::kThreads) {
    const int head = quad / (Traits::kDv / 4), d = quad % (Traits::kDv / 4) * 4;
    merge_quad<typename Traits::T>(
        p, p.num_splits, row, head, d,
        [&](int split) {
          return dev::load(reinterpret_cast<const float2*>(dev::cluster_map(own.ml + head * 2, split)));
        },
        [&](int split) {
          return dev::load(
              reinterpret_cast<const float4*>(dev::cluster_map(own.o + head * own.kHeadStride + d, split)));
        });
  }
  dev::cluster_arrive_relaxed();
  dev::cluster_wait();  // nobody leaves while its shared memory is read
}

template <class Traits>
__device__ __forceinline__ void decode_kernel(const DecodeParams& p) {
  NSA_SEL_DYNAMIC_SMEM(raw_smem);
  const SharedViews<Traits> smem(raw_smem, p.smem.num_slots);
  constexpr int kMapperWarp = kConsumerWarps + kLoaderWarps;
  const int thread = int(threadIdx.x);
  mapper::Mapper<Traits> mapper(p, smem);
  RawRow first_row{};
  if (thread >= 32 * kMapperWarp) {
    first_row = mapper.begin();
  } else if (thread >= 32 * (kMapperWarp - 1)) {
    init_barriers(smem);
    dev::grid_launch_dependents();  // the combine kernel may be set up while we run; it waits before it reads
  }
  __syncthreads();
  if (thread >= 32 * kMapperWarp) {
    mapper.run(first_row);
  } else if (thread >= 32 * kConsumerWarps) {
    loader::run<Traits>(p, smem, (thread >> 5) - kConsumerWarps);
  } else {
    // One value for the whole warp, and known to be: branches on it need no reconvergence.
    consumer::Consumer<Traits>(p, smem, __shfl_sync(0xffffffffu, thread >> 5, 0)).run();
  }
  if (p.cluster) cluster_combine(p, smem);
}

}  // namespace nsa_sel

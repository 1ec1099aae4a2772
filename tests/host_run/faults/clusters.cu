// clusters.cu - distributed shared memory, the cluster's barrier, and grids that depend on each other.
#include "fault.h"

namespace nsa_sel::faults {

enum class Remote { kRight, kNoFirstBarrier, kNoLastBarrier, kUninitialised, kNoWaitBeforeReuse, kWriteAfterArrive };

// Two blocks exchange a row through each other's shared memory.
template <Remote kRemote>
__device__ __forceinline__ void exchange(const Params& p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  const unsigned rank = dev::cluster_rank();
  if (kRemote != Remote::kUninitialised || t < 100) dev::store(a + t, float(rank * 1000 + t));
  if (kRemote != Remote::kNoFirstBarrier) {
    dev::cluster_arrive();
    if (kRemote == Remote::kWriteAfterArrive) dev::store(a + t, 0.0f);  // the barrier does not cover this one
    dev::cluster_wait();
  }
  // Without the last barrier only block 0 reads: whether block 1 is then still there depends on the schedule.
  const bool reads = kRemote != Remote::kNoLastBarrier || rank == 0;
  const float other = !reads ? 0.0f : dev::load(dev::cluster_map(a, rank ^ 1) + 127 - t);
  if (kRemote == Remote::kNoWaitBeforeReuse) dev::store(a + t, 0.0f);  // the other block may not have read it yet
  if (kRemote != Remote::kNoLastBarrier) {
    dev::cluster_arrive();
    dev::cluster_wait();  // neither may exit while the other reads
  }
  dev::store(p.out + rank * 128 + t, other);
}

#define REMOTE_FAULT(name, kind)                           \
  template <bool kFault>                                   \
  __global__ void name(const __grid_constant__ Params p) { \
    exchange<kFault ? Remote::kind : Remote::kRight>(p);   \
  }
REMOTE_FAULT(remote_no_first_barrier, kNoFirstBarrier)
REMOTE_FAULT(remote_exited_block, kNoLastBarrier)
REMOTE_FAULT(remote_uninit, kUninitialised)
REMOTE_FAULT(remote_reuse, kNoWaitBeforeReuse)
REMOTE_FAULT(remote_write_after_arrive, kWriteAfterArrive)
#undef REMOTE_FAULT

template <bool kFault>
__global__ void cluster_wait_without_arrive(const __grid_constant__ Params p) {
  if (!kFault || dev::cluster_rank() == 0) dev::cluster_arrive();
  dev::cluster_wait();
  dev::store(p.out + blockIdx.x * 128 + threadIdx.x, 1.0f);
}

template <bool kFault>
__global__ void cluster_deadlock(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint64_t* bar = dev::smem_at<uint64_t>(raw, 0, 1, "bar");
  const int t = int(threadIdx.x);
  if (t == 0) dev::mbarrier_init(bar, 128);
  __syncthreads();
  if (!kFault || dev::cluster_rank() == 0) dev::mbarrier_arrive(bar);
  dev::mbarrier_wait(bar, 0);  // the second block never gets past this, so the first waits in the barrier below
  dev::cluster_arrive();
  dev::cluster_wait();
  dev::store(p.out + blockIdx.x * 128 + t, 1.0f);
}

__global__ void write_scratch(const __grid_constant__ Params p) {
  const int t = int(blockIdx.x * blockDim.x + threadIdx.x);
  dev::grid_launch_dependents();
  dev::store(p.scratch + t, float(t));
}

template <bool kFault>
__global__ void read_scratch(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (!kFault) dev::grid_dependency_wait();
  dev::store(p.out + t, dev::load(p.scratch + t));
}

// Reads what the first grid wrote, waiting in one thread and telling the others at a barrier.
template <bool kFault>
__global__ void read_scratch_after_barrier(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (t == 0) dev::grid_dependency_wait();
  if (!kFault) __syncthreads();
  dev::store(p.out + t, dev::load(p.scratch + t));
}

// Writes over what the previous grid may still be reading.
template <bool kFault>
__global__ void overwrite_scratch(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (!kFault) dev::grid_dependency_wait();
  dev::store(p.scratch + t, 0.0f);
  dev::store(p.out + 128 + t, 0.0f);
}

}  // namespace nsa_sel::faults

using namespace nsa_sel;
using faults::Params;
using faults::Shape;

NSA_SEL_FAULT(remote_no_first_barrier, 2, 128, 4096, 2)
NSA_SEL_FAULT(remote_exited_block, 2, 128, 4096, 2)
NSA_SEL_FAULT(remote_uninit, 2, 128, 4096, 2)
NSA_SEL_FAULT(remote_reuse, 2, 128, 4096, 2)
NSA_SEL_FAULT(remote_write_after_arrive, 2, 128, 4096, 2)
NSA_SEL_FAULT(cluster_wait_without_arrive, 2, 128, 4096, 2)
NSA_SEL_FAULT(cluster_deadlock, 2, 128, 4096, 2)

extern "C" {

int fault_dependent_read(int faulty, float* out, const float* in, float* scratch, unsigned* counter) {
  const Params p{out, in, scratch, counter};
  dev::launch_kernel(faults::write_scratch, Shape{2, 64}, p, nullptr);
  return dev::launch_kernel(faulty ? faults::read_scratch<true> : faults::read_scratch<false>,
                            Shape{1, 128, 0, 1, true}, p, nullptr);
}

int fault_dependent_read_after_barrier(int faulty, float* out, const float* in, float* scratch, unsigned* counter) {
  const Params p{out, in, scratch, counter};
  dev::launch_kernel(faults::write_scratch, Shape{2, 64}, p, nullptr);
  return dev::launch_kernel(
      faulty ? faults::read_scratch_after_barrier<true> : faults::read_scratch_after_barrier<false>,
      Shape{1, 128, 0, 1, true}, p, nullptr);
}

int fault_dependent_overwrite(int faulty, float* out, const float* in, float* scratch, unsigned* counter) {
  const Params p{out, in, scratch, counter};
  dev::launch_kernel(faults::write_scratch, Shape{2, 64}, p, nullptr);
  dev::launch_kernel(faults::read_scratch<true>, Shape{1, 128}, p, nullptr);  // not programmatic: nothing to wait for
  return dev::launch_kernel(faulty ? faults::overwrite_scratch<true> : faults::overwrite_scratch<false>,
                            Shape{1, 128, 0, 1, true}, p, nullptr);
}

// One call of a two-grid operation, for tests of streams.
int stream_call(float* out, float* scratch) {
  const Params p{out, nullptr, scratch, nullptr};
  dev::launch_kernel(faults::write_scratch, Shape{4, 32}, p, nullptr);
  return dev::launch_kernel(faults::read_scratch<false>, Shape{1, 128, 0, 1, true}, p, nullptr);
}
}

// device_api.h - what the kernel's side of the host run calls. Everything is defined in the emulator, which is compiled
// without instrumentation, so each call is also an opaque compiler barrier, like the PTX that it stands for.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nsa_sel::emu {

// A place in the kernel's source. As a default argument `Site::here()` names the caller's line; accesses seen by the
// compiler's instrumentation carry a return address instead, resolved only when a report needs it.
struct Site {
  const char* file;
  int line;
  const void* pc;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line, nullptr};
  }
};

struct ThreadContext {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern ThreadContext* current_context;

enum class Shuffle { kXor, kIndex, kUp, kDown };
enum class Atomic { kAdd32, kAdd64, kAddFloat, kInc32, kExchange32, kMax32, kCompareSwap32 };

// ---- Accesses -------------------------------------------------------------------------------------------------------
void* carve_shared(size_t byte_offset, size_t bytes, const char* label, Site site);
void load(void* value, const void* p, int bytes, Site site);
void store(void* p, const void* value, int bytes, Site site);
uint64_t atomic(Atomic kind, void* p, uint64_t value, uint64_t compare, Site site);
void thread_fence(Site site);

// ---- Barriers and warp collectives ----------------------------------------------------------------------------------
void barrier_sync(int id, int threads, Site site);  // id 0, threads 0: __syncthreads
void warp_sync(unsigned mask, Site site);
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int argument, int width, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);
void ldmatrix_x4(uint32_t* r, bool transposed, const void* row, Site site);
uint32_t movmatrix_trans(uint32_t value, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site site);

// ---- Asynchronous copies and mbarriers ------------------------------------------------------------------------------
void cp_async(void* dst, const void* src, int bytes, bool valid, Site site);
void cp_async_arrive(uint64_t* barrier, Site site);
void cp_async_wait_all(Site site);
void mbarrier_init(uint64_t* barrier, uint32_t count, Site site);
void mbarrier_arrive(uint64_t* barrier, Site site);
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes, Site site);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site);
void bulk_copy_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* barrier, Site site);
void fence_barrier_init(Site site);
void fence_proxy_async(Site site);

// ---- Clusters and dependent grids -----------------------------------------------------------------------------------
unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive(Site site);
void cluster_wait(Site site);
void* cluster_map(void* p, unsigned rank, Site site);
void grid_dependency_wait(Site site);
void grid_launch_dependents(Site site);
[[noreturn]] void trap(Site site);

// ---- The host's side of a launch ------------------------------------------------------------------------------------
struct KernelEntry {
  const char* name;
  void (*invoke)(void (*kernel)(), const void* params);  // one CUDA thread: calls the kernel by its own type
  void (*kernel)();
  size_t params_bytes;
};
void register_kernel(const KernelEntry& entry);
const KernelEntry* find_kernel(const char* name);  // null: no such kernel

struct LaunchRequest {
  void (*invoke)(void (*kernel)(), const void* params);
  void (*kernel)();
  std::shared_ptr<const void> params;  // the argument: every thread may read it
  size_t params_bytes;
  unsigned grid, block, smem_bytes, cluster;
  bool programmatic;
};
int launch(LaunchRequest request);
// Copies the parameters, as on the device: the caller's struct may change before a recorded launch runs.
int launch(const KernelEntry& kernel, const void* params, unsigned grid, unsigned block, unsigned smem_bytes,
           unsigned cluster, bool programmatic);

}  // namespace nsa_sel::emu

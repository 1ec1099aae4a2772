// emulator.h - threads, warps, blocks and clusters of the host run. One fiber per CUDA thread; all fibers of a cluster
// share one scheduler on one host thread, so nothing here needs a lock.
#pragma once
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "device_api.h"
#include "ops.h"

namespace nsa_sel::emu {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kRedZone = 1024;              // between regions of shared memory: an index too large lands in it
constexpr size_t kMaxSharedBytes = 227 << 10;  // of one block on sm_90
constexpr int kMaxRegions = 64;
constexpr int kMaxClusterBlocks = 16;
constexpr unsigned kFullMask = ~0u;
constexpr uint16_t kNobody = 0xffff, kMany = 0xfffe;  // in place of a clock column
constexpr uint64_t kNoAddress = ~uint64_t(0);

using SiteId = uint32_t;

// ---- Threads, warps, blocks -----------------------------------------------------------------------------------------

struct Block;
struct Warp;

struct Fiber {
  char* stack = nullptr;
  void* saved_sp = nullptr;
  void* machine_context = nullptr;  // ucontext_t where there is no hand-written switch
  void* sanitizer_stack = nullptr;
};

struct AsyncCopy {
  char* dst;
  const char* src;  // null: zeros
  uint32_t bytes;
  uint32_t batch;  // position in the clock column of the agent that writes it
};

struct Thread {
  ThreadContext context;
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;  // in the block; in the warp
  bool done = false;
  SiteId waits_at = 0;
  const char* waits_for = "";
  uint64_t result = 0;  // of a collective

  int copy_column = -1;          // clock column of this thread's cp.async
  uint32_t copy_batch = 1;       // of the next copy; one more after every arrival or wait
  std::deque<AsyncCopy> copies;  // issued, not landed
  SiteId last_copy_site = 0;

  VectorClock fenced;                  // what it knew at its last __threadfence
  uint32_t fence_clock = 0;            // its own clock there
  std::vector<uint32_t> proxy_fences;  // its own clock at each fence.proxy.async
  VectorClock proxy_fenced;            // what it knew at the last of them
  uint32_t cluster_arrivals = 0;
  bool cluster_arrived = false;  // between arrive and wait
};

// Lanes that met, or wait for each other, at one warp-wide operation.
struct Collective {
  Op op;
  int variant;
  unsigned mask, arrived;
  SiteId site;
  const void* arguments[32];
};

// One request of a warp: the lanes that execute the same instruction together.
struct Request {
  SiteId site;
  Op op;
  uint8_t bytes;
  unsigned lanes, active;  // taking part; with an address
  uint64_t address[32];    // shared: byte offset. Global: buffer << 48 | byte offset.
};
struct RequestQueue {  // of one instruction, since the warp last converged
  uint32_t segment = 0;
  uint32_t executions[32];  // by lane
  uint32_t first = 0;       // number of the front of `open`
  std::deque<Request> open;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;  // in the block
  int order = 0;  // in the cluster: what the scheduler sorts by
  unsigned live = 0, ready = 0;
  uint32_t segment = 0;  // grows when all lanes converge
  std::vector<Collective> collectives;
  std::unordered_map<uint64_t, RequestQueue> requests;
  std::vector<uint64_t> touched;  // keys of `requests` used in this segment
};

struct Region {
  size_t offset, bytes;
  char* host;
  std::string label;
};

// What the emulator knows of two bytes of shared memory.
struct SharedCell {
  uint32_t write_clock, read_clock;  // read_clock indexes Block::read_sets when read_column is kMany
  uint16_t write_column, read_column;
  SiteId write_site, read_site;
  uint32_t remote_reads;  // 1 + cluster arrivals of the latest reader in another block
  uint8_t written, is_mbarrier;
};

struct Mbarrier {
  uint32_t count = 0;
  int64_t pending = 0, tx_bytes = 0;
  uint32_t phase = 0;                // completed phases
  VectorClock gathering, completed;  // released so far; as of the last completion
  std::vector<Thread*> waiters;
  std::deque<AsyncCopy> bulk_copies;  // not landed
  int bulk_column = -1;
  int init_thread = 0;
  uint32_t init_clock = 0;
  SiteId init_site = 0;
  bool fenced = false;  // its initialisation is visible to the async proxy
};

// An arrival that waits for the cp.async of its thread.
struct PendingArrival {
  Thread* thread;
  uint32_t batch;
  uint32_t barrier;  // shared-memory offset
  SiteId site;
};

struct NamedBarrier {
  int need = 0;  // threads; 0: all
  std::vector<int> waiting;
  SiteId site = 0;
};

struct RemoteAccess {
  uint32_t arrivals;  // cluster arrivals of the reader at that time
  SiteId site;
};

// One block's acquisition of what others published at `address` (an atomic there, then a fence).
struct Acquisition {
  const void* address;
  uint64_t sequence;
  int thread;
  uint32_t clock, fence_clock;  // fence_clock 0: not fenced yet
};

struct Launch;

struct Block {
  const Launch* launch = nullptr;
  unsigned id = 0, rank = 0;  // in the grid; in the cluster
  int threads = 0, live = 0;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  Clocks clocks;

  char* arena = nullptr;
  size_t arena_bytes = 0, arena_used = 0;
  std::vector<Region> regions;
  size_t last_region = 0;
  std::vector<SharedCell> cells;
  std::vector<VectorClock> read_sets;  // threads that read a cell since it was written, where there are several
  std::vector<uint32_t> free_read_sets;

  std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by shared-memory offset
  std::deque<PendingArrival> arrivals;
  NamedBarrier barriers[16];
  std::vector<VectorClock> cluster_releases;  // what the block released by its n-th cluster barrier
  std::vector<RemoteAccess> remote_accesses;  // by other blocks, to this block's shared memory
  std::vector<Acquisition> acquisitions;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;  // grows, reused
  unsigned size = 0, arena_blocks = 0;
  char* arena = nullptr;
  size_t arena_bytes = 0;
  std::vector<Warp*> warps;
  std::vector<uint64_t> ready_warps;  // a bit per warp
  uint32_t barrier_phase = 0;         // completed cluster barriers
  std::vector<Thread*> barrier_waiters;
  int live = 0;
};

}  // namespace nsa_sel::emu

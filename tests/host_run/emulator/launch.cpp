// launch.cpp - grids: cluster by cluster, one after the other or, for recorded streams, interleaved.
#include <cstdlib>
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

namespace {

void prepare_block(Block& block, const Launch& launch, unsigned id, unsigned rank) {
  const int threads = int(launch.request.block);
  block.launch = &launch;
  block.id = id;
  block.rank = rank;
  block.threads = block.live = threads;
  // Stacks stay with the threads: mapping them again for every block would cost more than running it.
  if (block.thread.size() > size_t(threads)) {
    for (size_t t = threads; t < block.thread.size(); ++t) block.thread[t].done = true;
  }
  block.thread.resize(std::max(block.thread.size(), size_t(threads)));
  block.warp.resize(std::max(block.warp.size(), size_t(threads + 31) / 32));
  block.clocks.reset(threads);
  reset_shared(block, launch.request.smem_bytes);
  block.mbarriers.clear();
  block.arrivals.clear();
  for (NamedBarrier& barrier : block.barriers) barrier = {};
  block.cluster_releases.clear();
  block.remote_accesses.clear();
  block.acquisitions.clear();
  for (size_t w = 0; w < block.warp.size(); ++w) {
    Warp& warp = block.warp[w];
    const int lanes = std::max(0, std::min(32, threads - int(w) * 32));
    warp.block = &block;
    warp.index = int(w);
    warp.live = lanes == 32 ? kFullMask : (1u << lanes) - 1;
    warp.ready = 0;
    warp.collectives.clear();
    warp.touched.clear();
    ++warp.segment;
  }
  for (int t = 0; t < threads; ++t) {
    Thread& thread = block.thread[t];
    Fiber fiber = thread.fiber;
    thread = Thread();
    thread.fiber = fiber;
    thread.context = {uint3{unsigned(t), 0, 0}, uint3{id, 0, 0}, dim3(threads), dim3(launch.request.grid)};
    thread.block = &block;
    thread.warp = &block.warp[t >> 5];
    thread.index = t;
    thread.lane = t & 31;
    prepare_fiber(thread);
  }
}

void run_cluster(Launch& launch, unsigned index) {
  Cluster& cluster = engine.cluster;
  const unsigned size = launch.request.cluster;
  engine.launch = &launch;
  cluster.size = size;
  while (cluster.blocks.size() < size) cluster.blocks.push_back(std::make_unique<Block>());
  reset_arenas(size, launch.request.smem_bytes);
  cluster.warps.clear();
  cluster.barrier_phase = 0;
  cluster.barrier_waiters.clear();
  cluster.live = int(size * launch.request.block);
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = *cluster.blocks[rank];
    prepare_block(block, launch, index * size + rank, rank);
    for (Warp& warp : block.warp) {
      if (!warp.live) continue;
      warp.order = int(cluster.warps.size());
      cluster.warps.push_back(&warp);
    }
  }
  cluster.ready_warps.assign((cluster.warps.size() + 63) / 64, 0);
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = *cluster.blocks[rank];
    for (int t = 0; t < block.threads; ++t) set_ready(block.thread[t]);
  }

  engine.abandoned = false;
  do {
    run_fibers();
  } while (!engine.abandoned && cluster.live > 0 && make_async_progress());
  engine.self = nullptr;
  current_context = nullptr;

  if (cluster.live > 0 && !engine.abandoned) {
    std::string waits;
    describe_waits(waits);
    finding_with_key("deadlock", waits, 0, "block %u: %d threads wait forever%s", index * size, cluster.live,
                     waits.c_str());
  } else if (!engine.abandoned) {
    for (unsigned rank = 0; rank < size; ++rank) report_lost_copies(*cluster.blocks[rank]);
    check_remote_accesses();
  }
  for (Warp* warp : cluster.warps) flush_requests(*warp);
  if (cluster.live > 0) engine.abandoned = true;
  release_arenas();
}

Launch& begin_launch(LaunchRequest request, int stream) {
  Launch& launch = engine.launches.emplace_back();
  launch.id = uint32_t(engine.launches.size());
  launch.session = engine.session;
  launch.stream = stream;
  const Launch*& last = engine.last_in_stream[stream];
  launch.previous = last;
  last = &launch;
  launch.clusters = request.grid / request.cluster;
  launch.request = std::move(request);
  return launch;
}

// Runs the launch's next cluster; false once the launch is over. A grid that hung or was abandoned goes no further.
bool step_launch(Launch& launch) {
  if (launch.next_cluster == launch.clusters) return false;
  const unsigned i = launch.next_cluster++;
  run_cluster(launch, engine.settings.schedule == 1 ? launch.clusters - 1 - i : i);
  if (engine.abandoned) launch.next_cluster = launch.clusters;
  return launch.next_cluster < launch.clusters;
}

// Of all kernels linked in; filled while the library loads.
std::unordered_map<std::string, KernelEntry>& kernels() {
  static std::unordered_map<std::string, KernelEntry> table;
  return table;
}

}  // namespace

void register_kernel(const KernelEntry& entry) { kernels()[entry.name] = entry; }

const KernelEntry* find_kernel(const char* name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

int launch(const KernelEntry& kernel, const void* params, unsigned grid, unsigned block, unsigned smem_bytes,
           unsigned cluster, bool programmatic) {
  constexpr size_t kAlignment = 64;  // of a kernel's parameters
  std::shared_ptr<void> copy(
      std::aligned_alloc(kAlignment, (kernel.params_bytes + kAlignment - 1) / kAlignment * kAlignment), std::free);
  memcpy(copy.get(), params, kernel.params_bytes);
  return launch(
      {kernel.invoke, kernel.kernel, copy, kernel.params_bytes, grid, block, smem_bytes, cluster, programmatic});
}

int launch(LaunchRequest request) {
  constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration
  constexpr int kInvalidValue = 1;          // cudaErrorInvalidValue
  if (request.cluster == 0) request.cluster = 1;
  if (request.grid == 0 || request.block == 0 || request.block > 1024 || request.grid % request.cluster ||
      request.cluster > unsigned(kMaxClusterBlocks)) {
    finding_with_key("launch", "shape", 0, "grid %u, block %u, cluster %u", request.grid, request.block,
                     request.cluster);
    return kInvalidConfiguration;
  }
  if (request.smem_bytes > kMaxSharedBytes) {
    finding_with_key("smem-size", "launch", 0, "%u bytes of shared memory, a block has %zu at most", request.smem_bytes,
                     kMaxSharedBytes);
    return kInvalidValue;
  }
  if (engine.recording) {
    engine.recorded[engine.record_stream].push_back(std::move(request));
    return 0;
  }
  Launch& running = begin_launch(std::move(request), 0);
  while (step_launch(running)) {
  }
  running.request.params = nullptr;
  return 0;
}

void begin_stream(int stream) {
  if (!engine.recording) ++engine.session;
  engine.recording = true;
  engine.record_stream = stream;
}

// All recorded launches: in order within a stream, block by block between streams, as the seed has it.
void run_streams(uint64_t seed) {
  engine.recording = false;
  struct Stream {
    int id;
    std::vector<LaunchRequest> launches;
    size_t next = 0;
    Launch* running = nullptr;
  };
  std::vector<Stream> streams;
  for (auto& [id, launches] : engine.recorded) streams.push_back({id, std::move(launches)});
  engine.recorded.clear();
  engine.last_in_stream.clear();
  uint64_t x = seed * 2 + 1;
  while (!streams.empty()) {
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    const size_t pick = (x >> 33) % streams.size();
    Stream& s = streams[pick];
    if (!s.running) {
      if (s.next == s.launches.size()) {
        streams.erase(streams.begin() + pick);
        continue;
      }
      s.running = &begin_launch(std::move(s.launches[s.next++]), s.id);
    }
    if (!step_launch(*s.running)) {
      s.running->request.params = nullptr;
      s.running = nullptr;
    }
  }
  ++engine.session;
  engine.last_in_stream.clear();
}

}  // namespace nsa_sel::emu

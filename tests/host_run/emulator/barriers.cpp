// barriers.cpp - barriers of the block and of the cluster, the dependency between grids, and what a thread's end means
// for all of them.
#include "internals.h"

namespace nsa_sel::emu {

namespace {

// bar.sync counts warps: one that is only partly there has not arrived.
int arrived_threads(const Block& block, const NamedBarrier& barrier, std::vector<unsigned>& lanes) {
  lanes.assign(block.warp.size(), 0);
  for (int t : barrier.waiting) lanes[t >> 5] |= 1u << (t & 31);
  int threads = 0;
  for (const Warp& warp : block.warp) {
    if (lanes[warp.index] && lanes[warp.index] == warp.live) threads += 32;
  }
  return threads;
}

void report_divergence(Block& block, int id, const NamedBarrier& barrier) {
  const SiteId first = block.thread[barrier.waiting.front()].waits_at;
  std::vector<SiteId> of_warp(block.warp.size(), 0);
  for (int t : barrier.waiting) {
    const SiteId site = block.thread[t].waits_at;
    SiteId& expected = of_warp[t >> 5];
    if (expected == 0) expected = site;
    // Different roles may meet at a named barrier from different lines; lanes of one warp and __syncthreads may not.
    const SiteId reference = id == 0 ? first : expected;
    if (site == reference) continue;
    finding("barrier-divergence", site, "thread %d meets others of %s that wait at %s", t,
            id == 0 ? "the block" : "its warp", location(reference).c_str());
  }
}

void release_if_full(Block& block, int id) {
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.waiting.empty()) return;
  if (barrier.need == 0) {
    if (int(barrier.waiting.size()) < block.live) return;
  } else {
    if (int(barrier.waiting.size()) < barrier.need) return;
    std::vector<unsigned> lanes;
    const int arrived = arrived_threads(block, barrier, lanes);
    if (arrived < barrier.need) return;
    if (arrived > barrier.need) {
      finding("barrier-count", barrier.site, "%d threads at named barrier %d, which was told %d", arrived, id,
              barrier.need);
    }
  }
  report_divergence(block, id, barrier);
  if (engine.settings.check) block.clocks.synchronise(barrier.waiting);
  std::vector<bool> flushed(block.warp.size(), false);
  for (int t : barrier.waiting) {
    if (!flushed[t >> 5]) flush_requests(block.warp[t >> 5]);
    flushed[t >> 5] = true;
    set_ready(block.thread[t]);
  }
  count(kBar, barrier.site, {1, 0, 0, 0, 0, barrier.waiting.size()});
  if (engine.settings.trace) note_event(block.thread[barrier.waiting.front()], kBar, barrier.site);
  barrier.waiting.clear();
}

void release_cluster_if_full() {
  Cluster& cluster = engine.cluster;
  for (unsigned b = 0; b < cluster.size; ++b) {
    for (const Thread& t : cluster.blocks[b]->thread) {
      if (!t.done && t.cluster_arrivals <= cluster.barrier_phase) return;
    }
  }
  if (cluster.live == 0) return;
  ++cluster.barrier_phase;
  for (Thread* t : cluster.barrier_waiters) set_ready(*t);
  cluster.barrier_waiters.clear();
}

}  // namespace

void barrier_sync(int id, int threads, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  if (sync_dropped(kBar, site)) return;
  Block& block = *self.block;
  if (id < 0 || id > 15 || threads % 32 || threads > block.threads) {
    finding("barrier-count", site,
            "thread %d: barrier %d for %d threads; ids are 0 to 15, counts multiples of 32 up to %d", self.index, id,
            threads, block.threads);
    return;
  }
  NamedBarrier& barrier = block.barriers[id];
  if (!barrier.waiting.empty() && barrier.need != threads) {
    finding("barrier-count", site, "thread %d says %d threads, others at %s said %d", self.index, threads,
            location(barrier.site).c_str(), barrier.need);
  }
  if (barrier.waiting.empty()) {
    barrier.need = threads;
    barrier.site = site;
  }
  barrier.waiting.push_back(self.index);
  self.waits_at = site;
  self.waits_for = id == 0 ? "__syncthreads" : "named_barrier_sync";
  self.warp->ready &= ~(1u << self.lane);
  if (!self.warp->ready) engine.cluster.ready_warps[self.warp->order >> 6] &= ~(1ull << (self.warp->order & 63));
  release_if_full(block, id);
  suspend_current();
}

void thread_exits(Thread& thread) {
  if (!thread.copies.empty()) {
    finding("exit-in-flight", thread.last_copy_site, "thread %d exits while %zu of its cp.async are in flight",
            thread.index, thread.copies.size());
  }
  for (int id = 0; id < 16; ++id) release_if_full(*thread.block, id);
  release_cluster_if_full();
}

// ---- Clusters -------------------------------------------------------------------------------------------------------

unsigned cluster_rank() { return engine.self->block->rank; }
unsigned cluster_size() { return engine.cluster.size; }

void cluster_arrive(Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kCluster, site, kNoAddress, 0);
  if (sync_dropped(kCluster, site)) return;
  if (self.cluster_arrived) {
    finding("cluster", site, "thread %d arrives a second time without cluster_wait", self.index);
    return;
  }
  self.cluster_arrived = true;
  std::vector<VectorClock>& releases = self.block->cluster_releases;
  if (releases.size() <= self.cluster_arrivals) {
    releases.push_back(releases.empty() ? VectorClock() : releases.back());
  }
  self.block->clocks.release(self.index, releases[self.cluster_arrivals]);
  ++self.cluster_arrivals;
  release_cluster_if_full();
}

void cluster_wait(Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kCluster, site, kNoAddress, 0);
  if (sync_dropped(kCluster, site)) return;
  if (!self.cluster_arrived) {
    finding("cluster", site, "thread %d waits without having arrived", self.index);
    return;
  }
  while (engine.cluster.barrier_phase < self.cluster_arrivals) {
    engine.cluster.barrier_waiters.push_back(&self);
    block_current("cluster_wait", site);
  }
  self.cluster_arrived = false;
  Clocks& clocks = self.block->clocks;
  clocks.acquire(self.index, self.block->cluster_releases[self.cluster_arrivals - 1]);
  uint32_t& known = clocks.row(self.index)[Clocks::kClusterBarrier];
  known = std::max(known, self.cluster_arrivals);
}

// A block's shared memory lives until its last thread ends: one of them has to wait for a barrier at which the reader
// arrives after its read. Found from the ordering, so whichever block the schedule lets end first.
void check_remote_accesses() {
  for (unsigned b = 0; b < engine.cluster.size; ++b) {
    const Block& block = *engine.cluster.blocks[b];
    uint32_t waited_for = 0;
    for (int t = 0; t < block.threads; ++t) {
      waited_for = std::max(waited_for, block.clocks.row(t)[Clocks::kClusterBarrier]);
    }
    for (const RemoteAccess& access : block.remote_accesses) {
      if (access.arrivals < waited_for) continue;
      finding("dsmem", access.site,
              "block %u may have exited: none of its threads waits for a cluster barrier after this read", block.id);
    }
  }
}

// ---- Grids ----------------------------------------------------------------------------------------------------------

void grid_dependency_wait(Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kGridDep, site, kNoAddress, 0);
  if (sync_dropped(kGridDep, site)) return;
  self.block->clocks.row(self.index)[Clocks::kGridDependency] = 1;
  engine.launch->waited = true;
}

void grid_launch_dependents(Site) { current(); }

void trap(Site where) {
  finding("trap", intern(where), "thread %d", engine.self->index);
  abandon_grid();
}

}  // namespace nsa_sel::emu

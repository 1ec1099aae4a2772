// mbarrier.cpp - phases, arrivals and waits. An arrival releases what its thread did and knows; a wait acquires what
// was released up to the completion of the phase that it observed.
#include <algorithm>

#include "internals.h"

namespace nsa_sel::emu {

Mbarrier* find_mbarrier(Thread& thread, const uint64_t* p, SiteId site, uint32_t* offset) {
  if (!in_shared_arena(p)) {
    finding("mbarrier", site, "thread %d: no address of shared memory", thread.index);
    return nullptr;
  }
  const SharedPlace place = find_shared(p, 8, false, site);
  if (!place.block) return nullptr;
  if (place.block != thread.block) {
    finding("mbarrier", site, "thread %d uses an mbarrier of another block", thread.index);
    return nullptr;
  }
  const auto at = place.block->mbarriers.find(place.offset);
  if (at == place.block->mbarriers.end()) {
    finding("mbarrier", site, "thread %d: %s+%zu was never initialised", thread.index, region_name(place),
            place.offset - place.region->offset);
    return nullptr;
  }
  Mbarrier& barrier = at->second;
  if (engine.settings.check &&
      !thread.block->clocks.knows(thread.index, Clocks::column_of(barrier.init_thread), barrier.init_clock)) {
    finding("mbarrier", site, "thread %d uses %s+%zu, not ordered after its initialisation at %s", thread.index,
            region_name(place), place.offset - place.region->offset, location(barrier.init_site).c_str());
  }
  if (offset) *offset = place.offset;
  return &barrier;
}

void release_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.tx_bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.completed = barrier.gathering;
  for (Thread* waiter : barrier.waiters) set_ready(*waiter);
  barrier.waiters.clear();
}

static void take_arrival(Mbarrier& barrier, SiteId site) {
  if (barrier.pending == 0) {
    finding("mbarrier", site, "more arrivals than the barrier's count of %u in one phase", barrier.count);
    return;
  }
  --barrier.pending;
}

void arrive_now(Thread& thread, Mbarrier& barrier, SiteId site) {
  if (engine.settings.check) thread.block->clocks.release(thread.index, barrier.gathering);
  take_arrival(barrier, site);
}

// Makes the copies visible to waiters, and nothing else that the thread did: it is the copies that arrive.
void cp_async_arrives(Mbarrier& barrier, const Thread& thread, uint32_t batch, SiteId site) {
  if (engine.settings.check && thread.copy_column >= 0) {
    if (int(barrier.gathering.size()) <= thread.copy_column) barrier.gathering.resize(thread.copy_column + 1, 0);
    uint32_t& known = barrier.gathering[thread.copy_column];
    known = std::max(known, batch);
  }
  take_arrival(barrier, site);
  release_phase_if_complete(barrier);
}

void mbarrier_init(uint64_t* p, uint32_t count, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  SharedPlace place;
  if (!in_shared_arena(p) || !shared_write(self, p, 8, site, &place)) {
    finding("mbarrier", site, "thread %d initialises a barrier outside of its shared memory", self.index);
    return;
  }
  auto [at, added] = self.block->mbarriers.try_emplace(place.offset);
  if (!added) {
    finding("mbarrier", site, "%s+%zu is initialised a second time", region_name(place),
            place.offset - place.region->offset);
  }
  if (count == 0) finding("mbarrier", site, "a count of 0");
  Mbarrier barrier;
  barrier.count = count;
  barrier.pending = count;
  barrier.init_thread = self.index;
  barrier.init_clock = self.block->clocks.now(self.index);
  barrier.init_site = site;
  at->second = std::move(barrier);
  if (engine.settings.check) {
    for (uint32_t c = place.offset >> 1; c < (place.offset + 8) >> 1; ++c) self.block->cells[c].is_mbarrier = 1;
  }
}

void mbarrier_arrive(uint64_t* p, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kMbarArrive, site, kNoAddress, 0);
  if (sync_dropped(kMbarArrive, site)) return;
  Mbarrier* barrier = find_mbarrier(self, p, site);
  if (!barrier) return;
  arrive_now(self, *barrier, site);
  release_phase_if_complete(*barrier);
  maybe_yield();
}

void mbarrier_arrive_expect_tx(uint64_t* p, uint32_t bytes, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kMbarArrive, site, kNoAddress, 0);
  if (sync_dropped(kMbarArrive, site)) return;
  Mbarrier* barrier = find_mbarrier(self, p, site);
  if (!barrier) return;
  barrier->tx_bytes += bytes;
  arrive_now(self, *barrier, site);
  release_phase_if_complete(*barrier);
  maybe_yield();
}

void mbarrier_wait(uint64_t* p, uint32_t parity, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kMbarWait, site, kNoAddress, 0);
  if (sync_dropped(kMbarWait, site)) return;
  maybe_yield();
  Mbarrier* barrier = find_mbarrier(self, p, site);
  if (!barrier) return;
  // Asks again after each wake-up: a thread that sleeps through a whole phase misses it, as it would on a device.
  while ((barrier->phase & 1) == (parity & 1)) {
    barrier->waiters.push_back(&self);
    block_current("mbarrier_wait", site);
  }
  if (engine.settings.check) self.block->clocks.acquire(self.index, barrier->completed);
}

void fence_barrier_init(Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kFence, site, kNoAddress, 0);
  if (sync_dropped(kFence, site)) return;
  for (auto& entry : self.block->mbarriers) {
    if (entry.second.init_thread == self.index) entry.second.fenced = true;
  }
}

}  // namespace nsa_sel::emu

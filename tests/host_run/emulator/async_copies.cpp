// async_copies.cpp - cp.async and bulk copies. Schedule 0 lets them land only when nobody can go on without them (and
// poisons their destination until then), schedule 1 at once, schedule 2 at random. Whenever they land, the shadow of
// shared memory treats them as in flight for every thread that has not waited for them.
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

namespace {

void land(const AsyncCopy& copy) {
  if (copy.src) {
    memcpy(copy.dst, copy.src, copy.bytes);
  } else {
    memset(copy.dst, 0, copy.bytes);
  }
}

void land_copies(Thread& thread, uint32_t up_to_batch) {
  while (!thread.copies.empty() && thread.copies.front().batch <= up_to_batch) {
    land(thread.copies.front());
    thread.copies.pop_front();
  }
}

bool lands_now() { return engine.settings.schedule == 1 || (engine.settings.schedule == 2 && next_random() % 2 == 0); }

int column_for_copies(Thread& thread, SiteId site) {
  if (thread.copy_column < 0) thread.copy_column = thread.block->clocks.add_column();
  if (thread.copy_column < 0) {
    finding_with_key("emulator", "columns", site, "too many asynchronous agents in one block");
    abandon_grid();
  }
  return thread.copy_column;
}

void fire(Block& block, size_t i) {
  const PendingArrival arrival = block.arrivals[i];
  block.arrivals.erase(block.arrivals.begin() + i);
  land_copies(*arrival.thread, arrival.batch);
  cp_async_arrives(block.mbarriers.at(arrival.barrier), *arrival.thread, arrival.batch, arrival.site);
}

void land_bulk(Mbarrier& barrier) {
  for (; !barrier.bulk_copies.empty(); barrier.bulk_copies.pop_front()) {
    const AsyncCopy& copy = barrier.bulk_copies.front();
    land(copy);
    barrier.tx_bytes -= copy.bytes;
    if (engine.settings.check) {
      if (int(barrier.gathering.size()) <= barrier.bulk_column) barrier.gathering.resize(barrier.bulk_column + 1, 0);
      barrier.gathering[barrier.bulk_column] = std::max(barrier.gathering[barrier.bulk_column], copy.batch);
    }
  }
  release_phase_if_complete(barrier);
}

bool land_some_bulk(Block& block) {
  for (auto& entry : block.mbarriers) {
    if (entry.second.bulk_copies.empty()) continue;
    land_bulk(entry.second);
    return true;
  }
  return false;
}

}  // namespace

bool make_async_progress() {
  for (unsigned b = 0; b < engine.cluster.size; ++b) {
    Block& block = *engine.cluster.blocks[b];
    if (!block.arrivals.empty()) {
      fire(block, engine.settings.schedule == 2 ? next_random() % block.arrivals.size() : 0);
      return true;
    }
    if (land_some_bulk(block)) return true;
  }
  return false;
}

void random_async_progress() {
  Block& block = *engine.cluster.blocks[next_random() % engine.cluster.size];
  for (int i = 0; i < 8 && !block.arrivals.empty(); ++i) fire(block, next_random() % block.arrivals.size());
  if (next_random() % 4 == 0) land_some_bulk(block);
}

void report_lost_copies(Block& block) {
  for (auto& entry : block.mbarriers) {
    if (entry.second.bulk_copies.empty()) continue;
    finding("exit-in-flight", entry.second.init_site, "block %u exits while bulk copies on this barrier are in flight",
            block.id);
  }
}

void cp_async(void* dst, const void* src, int bytes, bool valid, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  const int column = column_for_copies(self, site);
  if (!in_shared_arena(dst)) {
    finding("smem-oob", site, "thread %d: the destination of a cp.async is not shared memory", self.index);
    return;
  }
  SharedPlace place;
  if (!shared_async_write(self, dst, bytes, column, self.copy_batch, false, site, &place)) return;
  uint64_t address = kNoAddress;
  if (valid) {
    address = global_read(self, src, bytes, site);
    if (address == kNoAddress) return;
  }
  note(self, kLdgsts, site, address, bytes);
  note(self, kLdgstsStore, site, place.offset, bytes);
  self.last_copy_site = site;
  const AsyncCopy copy{static_cast<char*>(dst), valid ? static_cast<const char*>(src) : nullptr, uint32_t(bytes),
                       self.copy_batch};
  if (lands_now()) {
    land(copy);
  } else {
    memset(dst, 0xff, size_t(bytes));
    self.copies.push_back(copy);
  }
}

void cp_async_arrive(uint64_t* p, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kCpAsyncArrive, site, kNoAddress, 0);
  const bool dropped = sync_dropped(kCpAsyncArrive, site);
  uint32_t offset = 0;
  Mbarrier* barrier = find_mbarrier(self, p, site, &offset);
  if (!barrier) return;
  if (dropped) {  // the mistake that it stands for: a plain arrival, which does not wait for the copies
    arrive_now(self, *barrier, site);
    release_phase_if_complete(*barrier);
    return;
  }
  self.block->arrivals.push_back({&self, self.copy_batch++, offset, site});
  if (self.copies.empty() || engine.settings.schedule == 1) fire(*self.block, self.block->arrivals.size() - 1);
  maybe_yield();
}

void cp_async_wait_all(Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kWait, site, kNoAddress, 0);
  if (sync_dropped(kWait, site)) return;
  land_copies(self, self.copy_batch);
  if (self.copy_column >= 0) self.block->clocks.row(self.index)[self.copy_column] = self.copy_batch++;
}

void bulk_copy_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* p, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  Mbarrier* barrier = find_mbarrier(self, p, site);
  if (!barrier) return;
  if (!barrier->fenced) {
    finding("proxy", site,
            "thread %d starts a bulk copy on a barrier initialised at %s with no fence_barrier_init after it",
            self.index, location(barrier->init_site).c_str());
  }
  if (bytes % 16 || reinterpret_cast<uintptr_t>(src) % 16) {
    finding("misaligned", site, "thread %d: a bulk copy of %u bytes from %p; both must be multiples of 16", self.index,
            bytes, src);
    return;
  }
  if (!in_shared_arena(dst)) {
    finding("smem-oob", site, "thread %d: the destination of a bulk copy is not shared memory", self.index);
    return;
  }
  if (barrier->bulk_column < 0) barrier->bulk_column = self.block->clocks.add_column();
  if (barrier->bulk_column < 0) {
    finding_with_key("emulator", "columns", site, "too many asynchronous agents in one block");
    abandon_grid();
  }
  uint64_t first = kNoAddress;
  for (uint32_t i = 0; i < bytes; i += 16) {
    SharedPlace place;
    if (!shared_async_write(self, static_cast<char*>(dst) + i, 16, barrier->bulk_column, barrier->phase + 1, true, site,
                            &place))
      return;
    const uint64_t address = global_read(self, static_cast<const char*>(src) + i, 16, site);
    if (address == kNoAddress) return;
    if (i == 0) first = address;
  }
  count_bulk(first, bytes, site);
  if (engine.settings.trace) note_event(self, kBulk, site, int(first >> 48), first & ((1ull << 48) - 1));
  memset(dst, 0xff, bytes);
  barrier->bulk_copies.push_back({static_cast<char*>(dst), static_cast<const char*>(src), bytes, barrier->phase + 1});
  if (lands_now()) land_bulk(*barrier);
}

void fence_proxy_async(Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kFence, site, kNoAddress, 0);
  if (sync_dropped(kFence, site)) return;
  Clocks& clocks = self.block->clocks;
  const uint32_t* known = clocks.row(self.index);
  self.proxy_fenced.assign(known, known + clocks.width());
  self.proxy_fences.push_back(clocks.now(self.index));
  clocks.tick(self.index);
}

}  // namespace nsa_sel::emu

// accesses.cpp - loads, stores, atomics and fences of one thread, to shared or global memory by address.
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

static bool access(Thread& self, const void* p, int bytes, bool write, SiteId site) {
  if (in_shared_arena(p)) {
    SharedPlace place;
    if (!(write ? shared_write(self, p, bytes, site, &place) : shared_read(self, p, bytes, site, &place))) return false;
    note(self, write ? kSts : place.block == self.block ? kLds : kLdsRemote, site, place.offset, bytes);
    return true;
  }
  const uint64_t address = write ? global_write(self, p, bytes, site) : global_read(self, p, bytes, site);
  if (address == kNoAddress) return false;
  note(self, write ? kStg : kLdg, site, address, bytes);
  return true;
}

bool plain_access(Thread& thread, const void* p, int bytes, bool write, SiteId site) {
  return access(thread, p, bytes, write, site);
}

void load(void* value, const void* p, int bytes, Site site) {
  if (access(current(), p, bytes, false, intern(site))) {
    memcpy(value, p, bytes);
  } else {
    memset(value, 0xff, bytes);
  }
}

void store(void* p, const void* value, int bytes, Site site) {
  if (access(current(), p, bytes, true, intern(site))) memcpy(p, value, bytes);
}

uint64_t atomic(Atomic kind, void* p, uint64_t value, uint64_t compare, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  const int bytes = kind == Atomic::kAdd64 ? 8 : 4;
  if (in_shared_arena(p)) {
    // Ordered by the hardware against other atomics only; here it counts as a read and a write of this thread.
    SharedPlace place;
    if (!shared_read(self, p, bytes, site) || !shared_write(self, p, bytes, site, &place)) return 0;
    note(self, kSts, site, place.offset, bytes);
  } else {
    const uint64_t address = global_atomic(self, p, bytes, site);
    if (address == kNoAddress) return 0;
    note(self, kAtom, site, address, bytes);
  }
  uint64_t old = 0;
  memcpy(&old, p, bytes);
  uint64_t next = 0;
  float sum, addend;
  const uint32_t old32 = uint32_t(old), value32 = uint32_t(value);
  switch (kind) {
    case Atomic::kAdd32:
      next = uint32_t(old32 + value32);
      break;
    case Atomic::kAdd64:
      next = old + value;
      break;
    case Atomic::kAddFloat:
      memcpy(&sum, &old, 4);
      memcpy(&addend, &value, 4);
      sum += addend;
      memcpy(&next, &sum, 4);
      break;
    case Atomic::kInc32:
      next = old32 >= value32 ? 0 : old32 + 1;
      break;
    case Atomic::kExchange32:
      next = value32;
      break;
    case Atomic::kMax32:
      next = uint32_t(std::max(int32_t(old32), int32_t(value32)));
      break;
    case Atomic::kCompareSwap32:
      next = old32 == uint32_t(compare) ? value32 : old32;
      break;
  }
  memcpy(p, &next, bytes);
  return old;
}

void thread_fence(Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  note(self, kFence, site, kNoAddress, 0);
  if (sync_dropped(kFence, site)) return;
  Block& block = *self.block;
  const uint32_t* known = block.clocks.row(self.index);
  self.fenced.assign(known, known + block.clocks.width());
  self.fence_clock = block.clocks.now(self.index);
  for (Acquisition& a : block.acquisitions) {
    if (a.thread == self.index && a.fence_clock == 0) a.fence_clock = self.fence_clock;
  }
  block.clocks.tick(self.index);
}

}  // namespace nsa_sel::emu

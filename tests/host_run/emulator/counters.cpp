// counters.cpp - traffic as a warp makes it. The n-th execution of an instruction by a lane since the warp last
// converged joins the n-th request of that instruction, so the figures do not depend on the schedule.
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

namespace {

bool is_shared(Op op) { return op == kLds || op == kSts || op == kLdsm || op == kLdgstsStore || op == kLdsRemote; }
bool is_global(Op op) { return op == kLdg || op == kStg || op == kLdgsts || op == kAtom; }

// Wavefronts of a shared-memory request: 32, 16 or 8 lanes a pass for 4, 8 or 16 bytes; in a pass each bank serves one
// word. `ideal` is what the same lanes would need without conflicts.
int wavefronts_of(const Request& r, int& ideal) {
  const int lanes_a_pass = r.bytes <= 4 ? 32 : r.bytes == 8 ? 16 : 8;
  int total = 0;
  ideal = 0;
  for (int first = 0; first < 32; first += lanes_a_pass) {
    uint64_t words[32][32];
    uint8_t used[32] = {};
    int worst = 0;
    for (int lane = first; lane < first + lanes_a_pass; ++lane) {
      if (!(r.active >> lane & 1)) continue;
      for (int byte = 0; byte < std::max<int>(r.bytes, 4); byte += 4) {
        const uint64_t word = (r.address[lane] + byte) >> 2;
        const int bank = word & 31;
        int i = 0;
        while (i < used[bank] && words[bank][i] != word) ++i;
        if (i < used[bank]) continue;  // the same word: one access serves all lanes
        words[bank][used[bank]++] = word;
        worst = std::max(worst, int(used[bank]));
      }
    }
    total += worst;
    ideal += worst > 0;
  }
  return total;
}

// 32-byte sectors of a global request, counted from the start of each buffer: allocations are aligned to 256 bytes.
int count_sectors(const Request& r) {
  uint64_t sectors[64];
  int n = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(r.active >> lane & 1)) continue;
    for (uint64_t s = r.address[lane] >> 5; s <= (r.address[lane] + r.bytes - 1) >> 5; ++s) sectors[n++] = s;
  }
  std::sort(sectors, sectors + n);
  n = int(std::unique(sectors, sectors + n) - sectors);
  const bool writes = r.op == kStg || r.op == kAtom;
  for (int i = 0; i < n; ++i) {
    Buffer& buffer = engine.buffers[sectors[i] >> 43];
    uint8_t& touched = buffer.touched[sectors[i] & ((1ull << 43) - 1)];
    BufferCounters& c = buffer.counters;
    ++(writes ? c.sectors_written : c.sectors_read);
    const uint8_t bit = writes ? 2 : 1;
    if (!(touched & bit)) ++(writes ? c.distinct_sectors_written : c.distinct_sectors_read);
    touched |= bit;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(r.active >> lane & 1)) continue;
    Buffer& buffer = engine.buffers[r.address[lane] >> 48];
    if (writes) {
      buffer.counters.bytes_written += r.bytes;
    } else {
      buffer.counters.bytes_read += r.bytes;
      ++buffer.read_widths[r.bytes];
    }
  }
  return n;
}

void account(const Request& r) {
  const int lanes = __builtin_popcount(r.lanes);
  OpCounters amount{1, uint64_t(__builtin_popcount(r.active)) * r.bytes, 0, 0, 0, uint64_t(lanes)};
  if (is_shared(r.op)) {
    int ideal = 0;
    amount.wavefronts = wavefronts_of(r, ideal);
    amount.conflicts = amount.wavefronts - ideal;
  } else if (is_global(r.op) && r.active) {
    amount.sectors = count_sectors(r);
  }
  count(r.op, r.site, amount);
}

}  // namespace

void count(Op op, SiteId site, const OpCounters& amount) {
  engine.counters[op] += amount;
  engine.site_counters[uint64_t(site) << 8 | op] += amount;
}

void note(Thread& thread, Op op, SiteId site, uint64_t address, int bytes) {
  Warp& warp = *thread.warp;
  const uint64_t key = uint64_t(site) << 16 | uint64_t(op) << 8 | uint64_t(bytes);
  RequestQueue& queue = warp.requests[key];
  if (queue.segment != warp.segment) {
    queue.segment = warp.segment;
    memset(queue.executions, 0, sizeof queue.executions);
    queue.first = 0;
    queue.open.clear();
    warp.touched.push_back(key);
  }
  const uint32_t number = queue.executions[thread.lane]++ - queue.first;
  if (number == queue.open.size()) {
    queue.open.emplace_back();
    Request& r = queue.open.back();
    r.site = site;
    r.op = op;
    r.bytes = uint8_t(bytes);
    r.lanes = r.active = 0;
    if (engine.settings.trace) {
      const bool global = is_global(op) && address != kNoAddress;
      note_event(thread, op, site, global ? int(address >> 48) : -1, global ? address & ((1ull << 48) - 1) : 0);
    }
  }
  Request& r = queue.open[number];
  r.lanes |= 1u << thread.lane;
  if (address != kNoAddress) {
    r.active |= 1u << thread.lane;
    r.address[thread.lane] = address;
  }
  // Requests that all live lanes have joined are complete; without this a long loop would keep them all.
  while (!queue.open.empty() && (queue.open.front().lanes & warp.live) == warp.live) {
    account(queue.open.front());
    queue.open.pop_front();
    ++queue.first;
  }
}

void count_bulk(uint64_t address, uint32_t bytes, SiteId site) {
  Buffer& buffer = engine.buffers[address >> 48];
  const uint64_t offset = address & ((1ull << 48) - 1);
  const uint64_t first = offset >> 5, last = (offset + bytes - 1) >> 5;
  for (uint64_t sector = first; sector <= last; ++sector) {
    if (!(buffer.touched[sector] & 1)) ++buffer.counters.distinct_sectors_read;
    buffer.touched[sector] |= 1;
  }
  buffer.counters.sectors_read += last - first + 1;
  buffer.counters.bytes_read += bytes;
  ++buffer.read_widths[int(bytes)];
  count(kBulk, site, {1, bytes, last - first + 1, 0, 0, 1});
}

void flush_requests(Warp& warp) {
  for (uint64_t key : warp.touched) {
    RequestQueue& queue = warp.requests[key];
    for (const Request& r : queue.open) account(r);
    queue.open.clear();
  }
  warp.touched.clear();
  ++warp.segment;
}

void note_event(const Thread& thread, Op op, SiteId site, int buffer, uint64_t offset) {
  engine.trace.push_back({thread.block->id, thread.warp->index, op, site, buffer, offset});
}

}  // namespace nsa_sel::emu

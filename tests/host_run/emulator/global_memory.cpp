// global_memory.cpp - the registered buffers: bounds, alignment, and for tracked ones a shadow of every two bytes that
// knows which thread, block and grid wrote and read them last.
#include <algorithm>
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

namespace {

constexpr uint32_t kManyBlocks = ~0u;

int find_buffer(const void* p) {
  static size_t last = 0;
  const auto holds = [&](const Buffer& b) { return p >= b.base && p < b.base + b.bytes; };
  if (last < engine.buffers.size() && holds(engine.buffers[last])) return int(last);
  for (size_t i = 0; i < engine.buffers.size(); ++i) {
    if (holds(engine.buffers[i])) return int(last = i);
  }
  return -1;
}

// Is everything that launch `id` did complete and visible to a thread of `launch`?
bool completed_before(const Launch& launch, uint32_t id, bool waited) {
  if (!launch.request.programmatic) return true;
  if (id == kDependentLaunch || !launch.previous) return waited;
  const Launch& previous = *launch.previous;
  if (id == previous.id) return waited;
  // Older than the previous grid: complete if that one could not start, or cannot end, before it.
  if (!previous.request.programmatic || previous.waited) return true;
  return completed_before(previous, id, false);
}

struct GlobalCheck {
  Thread& thread;
  const Block& block;
  const Buffer& buffer;
  size_t offset;
  SiteId site;
  const char* verb;

  bool knows(uint16_t other, uint32_t clock) const {
    return block.clocks.knows(thread.index, Clocks::column_of(other), clock);
  }

  // Did `other`, a block of the same grid, publish what its thread did at `clock`, and has this thread acquired it?
  bool published(uint32_t other, uint16_t writer, uint32_t clock) const {
    const int column = Clocks::column_of(writer);
    for (unsigned b = 0; b < engine.cluster.size; ++b) {  // within a cluster: its barrier
      const Block& peer = *engine.cluster.blocks[b];
      if (peer.id != other || peer.launch != block.launch || &peer == &block) continue;
      const uint32_t known = block.clocks.row(thread.index)[Clocks::kClusterBarrier];
      if (known == 0 || peer.cluster_releases.size() < known) break;
      const VectorClock& released = peer.cluster_releases[known - 1];
      if (column < int(released.size()) && clock <= released[column]) return true;
    }
    for (const Acquisition& a : block.acquisitions) {  // else: fence and atomic there, atomic and fence here
      const int acquirer = Clocks::column_of(a.thread);
      const bool fenced = (a.fence_clock != 0 && block.clocks.knows(thread.index, acquirer, a.fence_clock)) ||
                          (acquirer < int(thread.fenced.size()) && thread.fenced[acquirer] >= a.clock);
      if (!fenced) continue;
      for (const Publication& p : engine.publications[a.address]) {
        if (p.launch != block.launch->id || p.block != other || p.sequence >= a.sequence) continue;
        if (column < int(p.fenced.size()) && clock <= p.fenced[column]) return true;
        const uint32_t fence = p.fence_clocks[writer];
        if (clock <= fence && column < int(p.known.size()) && fence <= p.known[column]) return true;
      }
    }
    return false;
  }

  void between_grids(uint32_t id, const char* what, SiteId where) const {
    const Launch* other = id == kDependentLaunch ? nullptr : &engine.launches[id - 1];
    const Launch& mine = *block.launch;
    if (other && other->session != mine.session) return;
    if (other && other->stream != mine.stream) {
      finding("stream-race", site, "block %u thread %d %s %s+%zu, %s at %s by a grid of another stream", block.id,
              thread.index, verb, buffer.name.c_str(), offset, what, location(where).c_str());
      return;
    }
    const bool waited = block.clocks.row(thread.index)[Clocks::kGridDependency] != 0;
    if (completed_before(mine, id, waited)) return;
    finding("griddep", site, "block %u thread %d %s %s+%zu, %s by the previous grid, before grid_dependency_wait",
            block.id, thread.index, verb, buffer.name.c_str(), offset, what);
  }

  void after_write(const GlobalCell& cell) const {
    if (cell.write_launch == 0) return;
    if (cell.write_launch != block.launch->id) {
      between_grids(cell.write_launch, "written", cell.write_site);
    } else if (cell.write_block != block.id) {
      if (published(cell.write_block, cell.write_thread, cell.write_clock)) return;
      finding("global-race", site, "block %u thread %d %s %s+%zu, written by block %u at %s without publication",
              block.id, thread.index, verb, buffer.name.c_str(), offset, cell.write_block,
              location(cell.write_site).c_str());
    } else if (!knows(cell.write_thread, cell.write_clock)) {
      finding("race", site, "thread %d %s %s+%zu, not ordered after the write by thread %d at %s", thread.index, verb,
              buffer.name.c_str(), offset, cell.write_thread, location(cell.write_site).c_str());
    }
  }

  void after_reads(const GlobalCell& cell) const {
    if (cell.read_launch == 0) return;
    if (cell.read_launch != block.launch->id) {
      between_grids(cell.read_launch, "read", cell.read_site);
    } else if (cell.read_block != block.id) {
      if (cell.read_block != kManyBlocks && cell.read_thread != kMany &&
          published(cell.read_block, cell.read_thread, cell.read_clock))
        return;
      finding("global-race", site, "block %u thread %d %s %s+%zu, read by another block at %s", block.id, thread.index,
              verb, buffer.name.c_str(), offset, location(cell.read_site).c_str());
    } else if (cell.read_thread != kMany && !knows(cell.read_thread, cell.read_clock)) {
      finding("race", site, "thread %d %s %s+%zu, not ordered after a read by thread %d at %s", thread.index, verb,
              buffer.name.c_str(), offset, cell.read_thread, location(cell.read_site).c_str());
    }
  }
};

void remember_read(GlobalCell& cell, const Thread& thread, SiteId site) {
  const Block& block = *thread.block;
  const uint32_t now = block.clocks.now(thread.index);
  if (cell.read_launch == block.launch->id && cell.read_block != block.id) {
    cell.read_block = kManyBlocks;
  } else if (cell.read_launch == block.launch->id && cell.read_thread != thread.index &&
             (cell.read_thread == kMany ||
              !block.clocks.knows(thread.index, Clocks::column_of(cell.read_thread), cell.read_clock))) {
    cell.read_thread = kMany;
  } else {
    cell.read_launch = block.launch->id;
    cell.read_block = block.id;
    cell.read_thread = uint16_t(thread.index);
    cell.read_clock = now;
  }
  cell.read_site = site;
}

uint64_t find_global(Thread& thread, const void* p, int bytes, bool write, SiteId site) {
  const int index = find_buffer(p);
  const char* at = static_cast<const char*>(p);
  if (index < 0) {
    finding("global-oob", site, "block %u thread %d %s %d bytes at %p, in no registered buffer", thread.block->id,
            thread.index, write ? "writes" : "reads", bytes, p);
    return kNoAddress;
  }
  const Buffer& b = engine.buffers[index];
  const size_t offset = at - b.base;
  if (offset + bytes > b.bytes) {
    finding("global-oob", site, "block %u thread %d %s %d bytes at %s+%zu, past its end at %zu", thread.block->id,
            thread.index, write ? "writes" : "reads", bytes, b.name.c_str(), offset, b.bytes);
    return kNoAddress;
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    finding("misaligned", site, "thread %d, %d-byte access to %s+%zu", thread.index, bytes, b.name.c_str(), offset);
  }
  if (write && !b.writable) {
    finding("readonly", site, "block %u thread %d writes %s+%zu", thread.block->id, thread.index, b.name.c_str(),
            offset);
    return kNoAddress;
  }
  return uint64_t(index) << 48 | offset;
}

}  // namespace

uint64_t global_read(Thread& thread, const void* p, int bytes, SiteId site) {
  const uint64_t address = find_global(thread, p, bytes, false, site);
  if (address == kNoAddress || !engine.settings.check) return address;
  Buffer& b = engine.buffers[address >> 48];
  if (b.cells.empty()) return address;
  const size_t offset = address & ((1ull << 48) - 1);
  const GlobalCheck check{thread, *thread.block, b, offset, site, "reads"};
  for (size_t c = offset >> 1; c < (offset + bytes + 1) >> 1; ++c) {
    GlobalCell& cell = b.cells[c];
    if (cell.write_launch == 0 && b.writable) {
      finding("uninit", site, "block %u thread %d reads %s+%zu, never written", thread.block->id, thread.index,
              b.name.c_str(), offset);
    }
    check.after_write(cell);
    remember_read(cell, thread, site);
  }
  return address;
}

uint64_t global_write(Thread& thread, const void* p, int bytes, SiteId site) {
  const uint64_t address = find_global(thread, p, bytes, true, site);
  if (address == kNoAddress || !engine.settings.check) return address;
  Buffer& b = engine.buffers[address >> 48];
  if (b.cells.empty()) return address;
  const size_t offset = address & ((1ull << 48) - 1);
  const GlobalCheck check{thread, *thread.block, b, offset, site, "writes"};
  for (size_t c = offset >> 1; c < (offset + bytes + 1) >> 1; ++c) {
    GlobalCell& cell = b.cells[c];
    check.after_write(cell);
    check.after_reads(cell);
    cell.write_launch = thread.block->launch->id;
    cell.write_block = thread.block->id;
    cell.write_thread = uint16_t(thread.index);
    cell.write_clock = thread.block->clocks.now(thread.index);
    cell.write_site = site;
    cell.read_launch = 0;
  }
  return address;
}

uint64_t global_atomic(Thread& thread, const void* p, int bytes, SiteId site) {
  const uint64_t address = find_global(thread, p, bytes, true, site);
  if (address == kNoAddress || !engine.settings.check) return address;
  Block& block = *thread.block;
  const uint64_t sequence = ++engine.atomic_sequence;
  Publication publication{block.launch->id, block.id, sequence, thread.fenced, {}, {}};
  const uint32_t* known = block.clocks.row(thread.index);
  publication.known.assign(known, known + block.clocks.width());
  for (const Thread& t : block.thread) publication.fence_clocks.push_back(t.fence_clock);
  engine.publications[p].push_back(std::move(publication));
  block.acquisitions.push_back({p, sequence, thread.index, block.clocks.now(thread.index), 0});
  block.clocks.tick(thread.index);
  return address;
}

void reset_buffer(Buffer& b) {
  b.counters = {};
  b.read_widths.clear();
  b.touched.assign(b.bytes / 32 + 2, 0);
  GlobalCell fresh{};
  if (b.dependent) fresh.write_launch = kDependentLaunch;
  b.cells.assign(b.tracked && engine.settings.check ? b.bytes / 2 + 8 : 0, fresh);
}

}  // namespace nsa_sel::emu

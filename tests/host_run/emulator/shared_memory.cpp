// shared_memory.cpp - the shadow of every two bytes of shared memory: who wrote and read them last, and whether the
// accessing thread is ordered after that (happens-before).
#include <cstdio>

#include "internals.h"

namespace nsa_sel::emu {

namespace {

const char* agent_name(const Block& block, uint16_t column, char (&text)[48]) {
  if (block.clocks.is_thread(column)) {
    snprintf(text, sizeof text, "thread %d", column - Clocks::kFirstThread);
  } else {
    snprintf(text, sizeof text, "an asynchronous copy");
  }
  return text;
}

// Ordering after the last writer, seen from another block: that block's cluster barriers are all that connects the two.
bool released_to_cluster(const Block& owner, const Thread& reader, uint16_t column, uint32_t clock) {
  const uint32_t known = reader.block->clocks.row(reader.index)[Clocks::kClusterBarrier];
  if (known == 0 || owner.cluster_releases.size() < known) return false;
  const VectorClock& released = owner.cluster_releases[known - 1];
  return column < released.size() && clock <= released[column];
}

struct CellCheck {
  Thread& thread;
  Block& block;
  const Region& region;
  long at;  // offset in the region
  SiteId site;
  const char* verb;

  void ordered_after_write(const SharedCell& cell) const {
    if (!cell.written || block.clocks.knows(thread.index, cell.write_column, cell.write_clock)) return;
    char who[48];
    if (block.clocks.is_thread(cell.write_column)) {
      finding("race", site, "thread %d %s %s+%ld, not ordered after the write by %s at %s", thread.index, verb,
              region.label.c_str(), at, agent_name(block, cell.write_column, who), location(cell.write_site).c_str());
    } else {
      finding("async-hazard", site, "thread %d %s %s+%ld without waiting for the asynchronous copy into it from %s",
              thread.index, verb, region.label.c_str(), at, location(cell.write_site).c_str());
    }
  }

  void ordered_after_reads(const SharedCell& cell) const {
    if (cell.remote_reads > 0) {
      const uint32_t known = block.clocks.row(thread.index)[Clocks::kClusterBarrier];
      if (known < cell.remote_reads) {
        finding("race", site, "thread %d %s %s+%ld, not ordered after a read by another block of the cluster at %s",
                thread.index, verb, region.label.c_str(), at, location(cell.read_site).c_str());
      }
    }
    if (cell.read_column == kNobody) return;
    int reader = -1;
    if (cell.read_column == kMany) {
      const VectorClock& set = block.read_sets[cell.read_clock];
      const uint32_t* known = block.clocks.row(thread.index);
      for (int c = Clocks::kFirstThread; c < int(set.size()); ++c) {
        if (set[c] > known[c]) reader = c - Clocks::kFirstThread;
      }
    } else if (!block.clocks.knows(thread.index, cell.read_column, cell.read_clock)) {
      reader = cell.read_column - Clocks::kFirstThread;
    }
    if (reader >= 0) {
      finding("race", site, "thread %d %s %s+%ld, not ordered after a read by thread %d at %s", thread.index, verb,
              region.label.c_str(), at, reader, location(cell.read_site).c_str());
    }
  }

  void plain_word(const SharedCell& cell) const {
    if (cell.is_mbarrier) {
      finding("mbarrier", site, "thread %d %s %s+%ld, the word of an mbarrier", thread.index, verb,
              region.label.c_str(), at);
    }
  }
};

void forget_reads(Block& block, SharedCell& cell) {
  if (cell.read_column == kMany) block.free_read_sets.push_back(cell.read_clock);
  cell.read_column = kNobody;
  cell.remote_reads = 0;
}

void remember_read(Block& block, SharedCell& cell, const Thread& thread, SiteId site) {
  const uint16_t column = uint16_t(Clocks::column_of(thread.index));
  const uint32_t now = block.clocks.now(thread.index);
  if (cell.read_column == kMany) {
    block.read_sets[cell.read_clock][column] = now;
  } else if (cell.read_column == kNobody || block.clocks.knows(thread.index, cell.read_column, cell.read_clock)) {
    cell.read_column = column;  // the earlier read is covered by this one
    cell.read_clock = now;
  } else {
    if (block.free_read_sets.empty()) {
      block.free_read_sets.push_back(uint32_t(block.read_sets.size()));
      block.read_sets.emplace_back();
    }
    const uint32_t index = block.free_read_sets.back();
    block.free_read_sets.pop_back();
    VectorClock& set = block.read_sets[index];
    set.assign(Clocks::kFirstThread + block.threads, 0);
    set[cell.read_column] = cell.read_clock;
    set[column] = now;
    cell.read_column = kMany;
    cell.read_clock = index;
  }
  cell.read_site = site;
}

bool remote_read(Thread& thread, const SharedPlace& place, const void* p, int bytes, SiteId site) {
  Block& owner = *place.block;
  const long at = static_cast<const char*>(p) - place.region->host;
  const uint32_t known = thread.block->clocks.row(thread.index)[Clocks::kClusterBarrier];
  const char* label = place.region->label.c_str();
  if (known == 0) {
    finding("dsmem", site,
            "thread %d of block %u reads %s+%ld of block %u before any cluster barrier: it may not have started",
            thread.index, thread.block->id, label, at, owner.id);
  }
  if (owner.live == 0) {
    finding("dsmem", site, "thread %d of block %u reads %s+%ld of block %u, which has exited", thread.index,
            thread.block->id, label, at, owner.id);
  }
  owner.remote_accesses.push_back({thread.cluster_arrivals, site});
  for (uint32_t c = place.offset >> 1; c < (place.offset + bytes + 1) >> 1; ++c) {
    SharedCell& cell = owner.cells[c];
    if (!cell.written) {
      finding("uninit", site, "thread %d of block %u reads %s+%ld of block %u, never written", thread.index,
              thread.block->id, label, at, owner.id);
    } else if (!released_to_cluster(owner, thread, cell.write_column, cell.write_clock)) {
      finding("race", site,
              "thread %d of block %u reads %s+%ld of block %u, not ordered after the write at %s by a cluster barrier",
              thread.index, thread.block->id, label, at, owner.id, location(cell.write_site).c_str());
    }
    cell.remote_reads = std::max(cell.remote_reads, thread.cluster_arrivals + 1);
    cell.read_site = site;
  }
  return true;
}

}  // namespace

bool shared_read(Thread& thread, const void* p, int bytes, SiteId site, SharedPlace* out) {
  const SharedPlace place = find_shared(p, bytes, false, site);
  if (!place.block) return false;
  if (out) *out = place;
  if (!engine.settings.check) return true;
  if (place.block != thread.block) return remote_read(thread, place, p, bytes, site);
  Block& block = *place.block;
  const CellCheck check{thread, block, *place.region, static_cast<const char*>(p) - place.region->host, site, "reads"};
  for (uint32_t c = place.offset >> 1; c < (place.offset + bytes + 1) >> 1; ++c) {
    SharedCell& cell = block.cells[c];
    if (!cell.written) {
      finding("uninit", site, "thread %d reads %s+%ld, never written", thread.index, place.region->label.c_str(),
              check.at);
      continue;
    }
    check.ordered_after_write(cell);
    check.plain_word(cell);
    remember_read(block, cell, thread, site);
  }
  return true;
}

bool shared_write(Thread& thread, const void* p, int bytes, SiteId site, SharedPlace* out) {
  const SharedPlace place = find_shared(p, bytes, true, site);
  if (!place.block) return false;
  if (out) *out = place;
  if (!engine.settings.check) return true;
  Block& block = *place.block;
  if (&block != thread.block) {
    finding("dsmem", site, "thread %d of block %u writes %s of block %u: remote stores are not part of the primitives",
            thread.index, thread.block->id, place.region->label.c_str(), block.id);
    return true;
  }
  const CellCheck check{thread, block, *place.region, static_cast<const char*>(p) - place.region->host, site, "writes"};
  for (uint32_t c = place.offset >> 1; c < (place.offset + bytes + 1) >> 1; ++c) {
    SharedCell& cell = block.cells[c];
    check.ordered_after_write(cell);
    check.ordered_after_reads(cell);
    check.plain_word(cell);
    forget_reads(block, cell);
    cell.write_column = uint16_t(Clocks::column_of(thread.index));
    cell.write_clock = block.clocks.now(thread.index);
    cell.write_site = site;
    cell.written = 1;
  }
  return true;
}

bool shared_async_write(Thread& thread, const void* p, int bytes, int column, uint32_t clock, bool bulk, SiteId site,
                        SharedPlace* place) {
  *place = find_shared(p, bytes < 16 ? bytes : 16, true, site);
  if (!place->block) return false;
  if (!engine.settings.check) return true;
  Block& block = *place->block;
  if (&block != thread.block) {
    finding("dsmem", site, "thread %d copies into the shared memory of block %u", thread.index, block.id);
    return true;
  }
  const CellCheck check{thread,         block,
                        *place->region, static_cast<const char*>(p) - place->region->host,
                        site,           "starts an asynchronous copy into"};
  for (uint32_t c = place->offset >> 1; c < (place->offset + bytes + 1) >> 1; ++c) {
    SharedCell& cell = block.cells[c];
    check.ordered_after_write(cell);
    check.ordered_after_reads(cell);
    check.plain_word(cell);
    if (bulk && cell.written && block.clocks.is_thread(cell.write_column)) {
      // A bulk copy is another proxy: the writer fences before it releases, or this thread after it acquires.
      const Thread& writer = block.thread[cell.write_column - Clocks::kFirstThread];
      const auto fence = std::lower_bound(writer.proxy_fences.begin(), writer.proxy_fences.end(), cell.write_clock);
      const bool by_writer =
          fence != writer.proxy_fences.end() && block.clocks.knows(thread.index, cell.write_column, *fence);
      const bool by_issuer =
          cell.write_column < thread.proxy_fenced.size() && cell.write_clock <= thread.proxy_fenced[cell.write_column];
      if (!by_writer && !by_issuer) {
        finding("proxy", site,
                "thread %d starts a bulk copy into %s+%ld, written at %s, with no fence_proxy_async between",
                thread.index, place->region->label.c_str(), check.at, location(cell.write_site).c_str());
      }
    }
    forget_reads(block, cell);
    cell.write_column = uint16_t(column);
    cell.write_clock = clock;
    cell.write_site = site;
    cell.written = 1;
  }
  return true;
}

}  // namespace nsa_sel::emu

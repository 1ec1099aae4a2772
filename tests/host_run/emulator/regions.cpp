// regions.cpp - shared memory as the kernel carves it up. Each region lies between red zones of its own, so that an
// index too large for one region does not land in the next as it would on the device.
#include <cstdlib>
#include <cstring>

#include "internals.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace nsa_sel::emu {

namespace {

constexpr size_t kRegionAlignment = 1024;  // host addresses keep the device's alignment up to this

const Region* region_around(Block& block, const char* p) {
  const auto holds = [&](const Region& r) { return p >= r.host - kRedZone / 2 && p < r.host + r.bytes + kRedZone / 2; };
  if (block.last_region < block.regions.size() && holds(block.regions[block.last_region])) {
    return &block.regions[block.last_region];
  }
  for (size_t i = 0; i < block.regions.size(); ++i) {
    if (holds(block.regions[i])) return &block.regions[block.last_region = i];
  }
  return nullptr;
}

const Region* add_region(Block& block, size_t offset, size_t bytes, const char* label, SiteId site) {
  for (const Region& r : block.regions) {
    if (r.offset == offset && r.bytes == bytes) return &r;
  }
  for (const Region& r : block.regions) {
    if (offset < r.offset + r.bytes && r.offset < offset + bytes) {
      finding_with_key("smem-overlap", label, site, "region %s [%zu, %zu) overlaps %s [%zu, %zu)", label, offset,
                       offset + bytes, r.label.c_str(), r.offset, r.offset + r.bytes);
    }
  }
  const size_t given = block.launch->request.smem_bytes;
  if (offset + bytes > given) {
    finding_with_key("smem-size", label, site, "region %s ends at %zu, the launch gave %zu bytes", label,
                     offset + bytes, given);
    bytes = given > offset ? given - offset : 0;
  }
  size_t at = block.arena_used + kRedZone;
  at += (offset % kRegionAlignment + kRegionAlignment - at % kRegionAlignment) % kRegionAlignment;
  if (at + bytes + kRedZone > block.arena_bytes) {
    finding_with_key("smem-size", "count", site, "more than %d regions of shared memory", kMaxRegions);
    abandon_grid();
  }
  block.arena_used = at + bytes;
  ASAN_UNPOISON_MEMORY_REGION(block.arena + at, bytes);
  block.regions.push_back({offset, bytes, block.arena + at, label});
  return &block.regions.back();
}

}  // namespace

const char* region_name(const SharedPlace& place) { return place.region->label.c_str(); }

bool in_shared_arena(const void* p) {
  const Cluster& c = engine.cluster;
  return c.arena && p >= c.arena && p < c.arena + c.arena_bytes * c.size;
}

SharedPlace find_shared(const void* p, int bytes, bool write, SiteId site) {
  const char* at = static_cast<const char*>(p);
  const Cluster& c = engine.cluster;
  Block& block = *c.blocks[(at - c.arena) / c.arena_bytes];
  const Region* r = region_around(block, at);
  if (!r || at < r->host || at + bytes > r->host + r->bytes) {
    finding("smem-oob", site, "thread %d %s %d bytes at %s%+ld, a region of %zu bytes",
            engine.self ? engine.self->index : -1, write ? "writes" : "reads", bytes,
            r ? r->label.c_str() : "no region", r ? long(at - r->host) : 0l, r ? r->bytes : 0);
    return {};
  }
  const uint32_t offset = uint32_t(r->offset + (at - r->host));
  if (offset % bytes) {
    finding("misaligned", site, "thread %d, %d-byte access to %s+%ld", engine.self ? engine.self->index : -1, bytes,
            r->label.c_str(), long(at - r->host));
  }
  return {&block, r, offset};
}

void reset_arenas(unsigned blocks, size_t smem_bytes) {
  Cluster& c = engine.cluster;
  release_arenas();
  c.arena_bytes = (smem_bytes + (kMaxRegions + 1) * (kRedZone + kRegionAlignment) + kRegionAlignment - 1) /
                  kRegionAlignment * kRegionAlignment;
  c.arena = static_cast<char*>(aligned_alloc(kRegionAlignment, c.arena_bytes * blocks));
  if (!c.arena) abort();
  c.arena_blocks = blocks;
  for (unsigned b = 0; b < blocks; ++b) c.blocks[b]->arena = c.arena + b * c.arena_bytes;
}

void release_arenas() {
  Cluster& c = engine.cluster;
  if (!c.arena) return;
  ASAN_UNPOISON_MEMORY_REGION(c.arena, c.arena_bytes * c.arena_blocks);
  free(c.arena);
  c.arena = nullptr;
}

void reset_shared(Block& block, size_t smem_bytes) {
  block.arena_bytes = engine.cluster.arena_bytes;
  block.arena_used = 0;
  block.regions.clear();
  block.regions.reserve(kMaxRegions + 1);
  ASAN_UNPOISON_MEMORY_REGION(block.arena, block.arena_bytes);
  memset(block.arena, 0xff, block.arena_bytes);  // NaN in every format: what is read too early shows in the numbers too
  ASAN_POISON_MEMORY_REGION(block.arena, block.arena_bytes);
  block.free_read_sets.clear();
  for (uint32_t i = 0; i < block.read_sets.size(); ++i) block.free_read_sets.push_back(i);
  SharedCell fresh{};
  fresh.read_column = kNobody;
  block.cells.assign(engine.settings.check ? (smem_bytes >> 1) + 8 : 0, fresh);
}

void* carve_shared(size_t byte_offset, size_t bytes, const char* label, Site site) {
  Block& block = *engine.self->block;
  for (const Region& r : block.regions) {
    if (r.offset == byte_offset && r.bytes == bytes) return r.host;
  }
  return add_region(block, byte_offset, bytes, label, intern(site))->host;
}

void* cluster_map(void* p, unsigned rank, Site site) {
  Thread& self = current();
  const SiteId id = intern(site);
  if (rank >= engine.cluster.size) {
    finding("dsmem", id, "thread %d maps to block %u of a cluster of %u", self.index, rank, engine.cluster.size);
    abandon_grid();
  }
  if (!in_shared_arena(p)) {
    finding("dsmem", id, "thread %d maps an address outside of shared memory", self.index);
    abandon_grid();
  }
  const char* at = static_cast<const char*>(p);
  const Region* mine = region_around(*self.block, at);
  if (!mine) {
    finding("smem-oob", id, "thread %d maps an address in no region", self.index);
    abandon_grid();
  }
  const Region* theirs = add_region(*engine.cluster.blocks[rank], mine->offset, mine->bytes, mine->label.c_str(), id);
  return theirs->host + (at - mine->host);
}

}  // namespace nsa_sel::emu

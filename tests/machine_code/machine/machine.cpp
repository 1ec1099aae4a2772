// machine.cpp - blocks and launches: one issue slot a scheduler and clock, one shared-memory port, one link to memory.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace mc {
namespace {

constexpr double kPatience = 400'000;  // clocks without a store, an arrival or a copy that landed: a deadlock

}  // namespace

// ---- Blocks

Block::Block(Launch& owner, int number, int place, int count, uint32_t shared_bytes)
    : launch(owner), index(number), rank(place), shared(owner.program.capability >= 90 ? 0x400 : 0, shared_bytes) {
  for (int i = 0; i < count; ++i) warps.push_back(std::make_unique<Warp>(*this, i));
}

bool Block::running() const {
  return std::any_of(warps.begin(), warps.end(), [](const auto& w) { return !w->done; });
}

uint32_t Block::offset_of(uint64_t address) const {
  if (launch.program.capability < 90) return uint32_t(address);
  if (int(address >> 24 & 0xff) != rank)
    throw Fault("shared address of block " + std::to_string(address >> 24 & 0xff) + " of the cluster");
  return uint32_t(address & 0xffffff);
}

Block& Block::owner_of(uint64_t address) {
  if (launch.program.capability < 90) return *this;
  const size_t owner = size_t(address >> 24 & 0xff);
  if (owner >= cluster->size())
    throw Fault("shared memory of block " + std::to_string(owner) + ", the cluster has " +
                std::to_string(cluster->size()));
  Block& other = *(*cluster)[owner];
  if (!other.running())
    throw Fault("shared memory of block " + std::to_string(owner) + " of the cluster, which has exited");
  return other;
}

// sm_90 initialises an mbarrier by SYNCS.EXCH. Below, a store of two words does: 2^30 - count, 2^31 - count; bit 31 of
// the second is the phase, and code reads it by plain loads.
Barrier& Block::barrier(uint32_t offset) {
  const auto found = barriers.find(offset);
  if (found != barriers.end()) return found->second;
  if (launch.program.capability >= 90) throw Fault("no mbarrier at " + std::to_string(offset));
  uint32_t words[2];
  shared.read(offset, words, 8);
  const uint32_t count = 0x40000000u - words[0];
  if (count == 0 || count > 0xfffff || words[1] != 0x80000000u - count)
    throw Fault("no mbarrier at " + std::to_string(offset));
  return barriers[offset] = Barrier{int(count), int(count), 0, 0, {}};
}

void Block::arrive(uint32_t offset, int n, int64_t bytes) {
  Barrier& b = barrier(offset);
  launch.progress = launch.now;
  b.pending -= n, b.bytes += bytes;
  if (b.pending < 0) throw Fault("more arrivals at an mbarrier than its count of " + std::to_string(b.count));
  if (b.pending == 0 && b.bytes == 0) {
    b.pending = b.count, b.phase ^= 1;
    for (Warp* w : b.waiting) w->wake(launch.now);
    b.waiting.clear();
  }
  if (launch.program.capability >= 90) return;
  const uint32_t words[2] = {0x40000000u - uint32_t(b.count),
                             uint32_t(b.phase) << 31 | ((0x80000000u - uint32_t(b.pending)) & 0x7fffffffu)};
  shared.write(offset, words, 8);
}

// ---- The launch

void Launch::set_constants(int grid, int warps) {
  constants_.assign(0x1200 / 4, 0);
  known_.assign(constants_.size(), false);
  const auto set = [&](uint32_t offset, uint32_t value) { constants_[offset / 4] = value, known_[offset / 4] = true; };
  const bool hopper = program.capability >= 90;
  for (const uint32_t one : {0x4u, 0x8u, 0x10u, 0x14u}) set(one, 1);
  set(0x0, uint32_t(32 * warps)), set(0xc, uint32_t(grid));
  set(0x18, 0), set(0x1c, kSharedWindow);  // base of the window of shared memory
  set(0x28, 0);                            // stack pointer: no kernel here has a stack
  for (const uint32_t descriptor : {0u, 4u}) set((hopper ? 0x208 : 0x118) + descriptor, 0);
  if (hopper) set(0x140, cluster_size > 1), set(0x144, 0);  // whether blocks were launched in clusters
  const uint32_t first = hopper ? 0x210 : 0x160;
  for (uint32_t i = 0; i + 4 <= parameters.size(); i += 4) {
    uint32_t value;
    std::memcpy(&value, &parameters[i], 4);
    set(first + i, value);
  }
}

uint32_t Launch::constant(int bank, uint32_t offset) const {
  const auto found = program.banks.find(bank);
  if (found != program.banks.end() && offset + 4 <= found->second.size()) {
    uint32_t value;
    std::memcpy(&value, &found->second[offset], 4);
    return value;
  }
  if (bank != 0 || offset % 4 != 0 || offset / 4 >= constants_.size() || !known_[offset / 4]) {
    throw Fault("unknown constant " + std::to_string(bank) + ", " + std::to_string(offset));
  }
  return constants_[offset / 4];
}

void Launch::at(double time, std::function<void()> action) { events.push({time, order++, std::move(action)}); }

double Launch::global_latency(const uint64_t* addresses, Mask m) {
  if (model.cold == 0 || m == 0) return model.l2;
  if (model.cold != 2) {
    const std::string& name = memory.name_of(addresses[__builtin_ctz(m)]);
    if (name[0] != 'k' && name[0] != 'v') return model.l2;
    if (model.cold == 3) return model.dram;
  }
  bool fresh = false;
  for (int i = 0; i < 32; ++i) {
    if (m >> i & 1) fresh |= touched.insert(addresses[i] >> 7).second;
  }
  return fresh ? model.dram : model.l2;
}

void Launch::run(int grid, int warps, uint32_t shared_bytes, int clusters) {
  counts.assign(program.counters.size(), 0);
  visited.assign(program.code.size(), false);
  set_constants(grid, warps);
  const int stop = clusters > 0 ? std::min(grid, clusters * cluster_size) : grid;
  for (int first = 0; first < stop; first += cluster_size) run_cluster(first, warps, shared_bytes);
}

void Launch::run_cluster(int first_block, int warps, uint32_t shared_bytes) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> running;
  for (int i = 0; i < cluster_size; ++i) {
    blocks.push_back(std::make_unique<Block>(*this, first_block + i, i, warps, shared_bytes));
    blocks.back()->cluster = &blocks;
    for (auto& w : blocks.back()->warps) running.push_back(w.get());
  }
  now = progress = 0;
  cluster_phase = 0, cluster_arrived = 0, cluster_warps = int(running.size());
  cluster_waiting.clear();
  while (!running.empty()) {
    Warp* best = nullptr;
    double first = std::numeric_limits<double>::infinity();
    for (Warp* w : running) {
      if (w->sleeping || w->clock >= first) continue;
      double t = w->ready_at();
      if (model.contention) {
        const Instruction& x = w->instruction();
        const size_t scheduler = size_t(w->index % 4);
        t = std::max(t, w->block.slot[scheduler]);
        if (x.port) t = std::max(t, w->block.port);
        if (x.tensor) t = std::max(t, w->block.tensor[scheduler]);
      }
      if (t < first) best = w, first = t;
    }
    if (!events.empty() && events.top().time <= first) {
      now = events.top().time;
      const auto action = events.top().action;
      events.pop();
      action();
      continue;
    }
    if (best == nullptr || first > progress + kPatience) {
      std::string who;
      for (const Warp* w : running) {
        char text[48];
        std::snprintf(text, sizeof text, " block %d warp %d at %05x", w->block.index, w->index,
                      w->instruction().address);
        who += text;
      }
      throw Fault("deadlock:" + who);
    }
    if (++instructions > limit) throw Fault("more than " + std::to_string(limit) + " instructions");
    now = first;
    best->step(first);
    best->block.slot[size_t(best->index % 4)] = first + 1;
    if (best->done) {
      progress = now;
      end = std::max(end, best->clock);
      for (size_t s = 0; s < stages.size(); ++s) {
        const StageClocks& own = best->stages[s];
        stages[s].busy += own.busy, stages[s].stalled += own.stalled, stages[s].slept += own.slept;
        stages[s].issued += own.issued, stages[s].entered += own.entered;
      }
      running.erase(std::find(running.begin(), running.end(), best));
    }
  }
  if (!events.empty()) throw Fault("blocks exited while copies were in flight");
}

}  // namespace mc

// machine.cpp - warps, blocks and the clock: in-order issue from the scheduling words, one issue slot a scheduler and
// clock, one shared-memory port, one link to memory.
#include "machine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mc {
namespace {

constexpr double kPatience = 400'000;  // clocks without a store, an arrival or a copy that landed: a deadlock
constexpr int kPollingLoop = 6;        // instructions of a loop that sleeps and asks again
constexpr int kSpins = 256;            // backward jumps of some lanes before the others get their turn

}  // namespace

// ---- Lanes of a warp
// -------------------------------------------------------------------------------------------------

// A register that nobody wrote holds NaN in every form: code may read it, but never use what it read.
Warp::Warp(Block& owner, int number) : block(owner), index(number), stages(owner.launch.stages.size()) {
  for (Lanes& r : R)
    for (uint32_t& x : r.v) x = 0x7fff7fffu;
}

const Instruction& Warp::instruction() const {
  const std::vector<Instruction>& code = block.launch.program.code;
  if (size_t(pc) >= code.size()) throw Fault("runs off the end of the kernel");
  return code[size_t(pc)];
}

void Warp::fault(const std::string& what) const {
  char at[64];
  std::snprintf(at, sizeof at, "block %d warp %d at %05x ", block.index, index, instruction().address);
  throw Fault(at + instruction().text + ": " + what);
}

void Warp::jump(int target, Mask m) {
  if (size_t(target) >= block.launch.program.code.size()) fault("jump outside the kernel");
  const bool backward = target <= pc;
  if (m == mask) {
    pc = target, moved = jumped = true;
    if (backward && ++spins >= kSpins) rotate();
  } else {
    ready.push_back({target, m});
    mask &= ~m;
  }
}

Mask Warp::members_of(const Waiting& w) const { return (w.key >= 0 ? B[size_t(w.key)].members : w.members) & alive; }

// All of a meeting's members are there: they become the running group.
bool Warp::resume(int key) {
  Mask arrived = 0, members = 0;
  int following = 0;
  for (const Waiting& w : waiting) {
    if (w.key != key) continue;
    arrived |= w.mask, members |= members_of(w), following = w.following;
  }
  if (arrived == 0 || (arrived & members) != members) return false;
  waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [&](const Waiting& w) { return w.key == key; }),
                waiting.end());
  mask = arrived & alive, pc = following, moved = true, spins = 0;
  return true;
}

void Warp::gather(const Waiting& arrived) {
  waiting.push_back(arrived);
  if (!resume(arrived.key)) switch_group();
}

void Warp::release() {
  const Group running{pc, mask};
  const bool was_moved = moved;
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (resume(waiting[i].key)) {
      ready.push_back({pc, mask});
      i = size_t(-1);
    }
  }
  pc = running.pc, mask = running.mask, moved = was_moved;
}

void Warp::switch_group() {
  if (ready.empty()) fault("no lanes can go on: deadlock inside the warp");
  pc = ready.back().pc, mask = ready.back().mask;
  ready.pop_back();
  moved = jumped = true;
}

void Warp::rotate() {
  spins = 0;
  if (ready.empty()) return;
  ready.push_back({pc, mask});
  pc = ready.front().pc, mask = ready.front().mask;
  ready.pop_front();
}

void Warp::exit(Mask m) {
  alive &= ~m;
  mask &= ~m;
  release();
  if (mask != 0) return;
  if (alive == 0) {
    done = true;
  } else {
    switch_group();
  }
}

// ---- Hazards: a register is not touched before its scoreboard has been waited for
// --------------------------------------

void Warp::wait_for(int scoreboards) {
  for (size_t b = 0; b < 6; ++b) {
    if (!(scoreboards >> b & 1) || guarded[b].empty()) continue;
    for (const uint16_t n : guarded[b]) {
      if (arriving[n].scoreboard == int(b)) arriving[n] = {};
      if (in_use[n].scoreboard == int(b) || in_use[n].other == int(b)) in_use[n] = {};
    }
    guarded[b].clear();
  }
}

void Warp::check_hazards(const Instruction& x, Mask m) {
  for (const uint16_t n : x.sources) {
    if (arriving[n].lanes & m)
      fault("reads a register (number " + std::to_string(n) + ") before its value has arrived");
  }
  for (const uint16_t n : x.destinations) {
    if (arriving[n].lanes & m) fault("writes a register (number " + std::to_string(n) + ") whose value is under way");
    if (in_use[n].lanes & m) fault("writes a register (number " + std::to_string(n) + ") that is still being read");
  }
}

void Warp::note_hazards(const Instruction& x, Mask m) {
  for (const uint16_t n : x.destinations) {
    if (x.writes >= 6) break;
    arriving[n].lanes |= m, arriving[n].scoreboard = int8_t(x.writes);
    guarded[size_t(x.writes)].push_back(n);
  }
  for (const uint16_t n : x.sources) {
    if (x.reads >= 6 || n >= kUniform) continue;  // uniform registers and predicates are read at once
    in_use[n].lanes |= m, in_use[n].scoreboard = int8_t(x.reads),
                          in_use[n].other = int8_t(x.writes < 6 ? x.writes : -1);
    guarded[size_t(x.reads)].push_back(n);
    if (x.writes < 6) guarded[size_t(x.writes)].push_back(n);
  }
}

// ---- Time
// ------------------------------------------------------------------------------------------------------------

double Warp::ready_at() const {
  if (hold > clock) return hold;
  double t = clock;
  const int waits = instruction().waits;
  for (size_t b = 0; waits >> b; ++b) {
    if (waits >> b & 1) t = std::max(t, scoreboard[b]);
  }
  return t;
}

void Warp::step(double at) {
  const Instruction& x = instruction();
  Launch& launch = block.launch;
  const Model& model = launch.model;
  const int here = x.stage < 0 ? stage : x.stage;
  if (here >= 0 && here != stage) ++stages[size_t(here)].entered;
  stage = here;
  issued = at, moved = jumped = false, cost = 1, latency = x.latency;
  StageClocks spare, &share = stage >= 0 ? stages[size_t(stage)] : spare;
  if (polling >= 0 && (pc < polling || pc > polling + kPollingLoop)) polling = -1;
  (polling >= 0 ? share.slept : share.stalled) += at - clock;
  wait_for(x.waits);
  Mask m = mask;
  if (x.guard >= 0) {
    const Mask p =
        x.guard >= kUniformPredicate ? UP[size_t(x.guard - kUniformPredicate)] : P[size_t(x.guard - kPredicate)];
    if (arriving[size_t(x.guard)].lanes & m) fault("guarded by a predicate that has not arrived");
    if (x.guard != kPredicate + 7 && x.guard != kUniformPredicate + 7) {
      m &= x.guard_inverted ? ~p : p;
    } else if (x.guard_inverted) {
      m = 0;
    }
  }
  clock = at + std::max(1, x.stall);
  double taken = 10;  // where no lane takes part
  if (x.guard < 0 || m != 0) {
    if (!x.execute) fault("unknown: " + x.unknown);
    check_hazards(x, m);
    try {
      x.execute(*this, m);
    } catch (const Fault& error) {
      if (std::string(error.what()).rfind("block ", 0) == 0) throw;
      pc = int(x.address / 16);
      fault(error.what());
    }
    note_hazards(x, m);
    if (x.port) block.port = at + cost;
    if (x.tensor) block.tensor[size_t(index % 4)] = at + model.hmma_every;
    ++launch.counts[size_t(x.counter)];
    launch.visited[x.address / 16] = true;
    taken = latency + cost - 1;
  }
  if (x.writes < 6) scoreboard[size_t(x.writes)] = std::max(scoreboard[size_t(x.writes)], at + taken);
  if (x.reads < 6) scoreboard[size_t(x.reads)] = std::max(scoreboard[size_t(x.reads)], at + 11 + cost);
  if (jumped) clock += model.branch;
  if (!moved && !done) ++pc;
  ++share.issued;
  (polling >= 0 ? share.slept : share.busy) += clock - at;
}

void Warp::wake(double now) {
  sleeping = false;
  const double resumed = std::max(clock, now + 20);
  if (stage >= 0) stages[size_t(stage)].slept += resumed - clock;
  clock = resumed;
}

// ---- Blocks
// ----------------------------------------------------------------------------------------------------------

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
// ------------------------------------------------------------------------------------------------------

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

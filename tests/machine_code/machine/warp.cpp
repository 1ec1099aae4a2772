// warp.cpp - a warp: groups of lanes, hazards, and its own time by the scheduling words.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace mc {
namespace {

constexpr int kPollingLoop = 6;  // instructions of a loop that sleeps and asks again
constexpr int kSpins = 256;      // backward jumps of some lanes before the others get their turn

}  // namespace

// ---- Lanes of a warp

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

// Loads of shared memory read and write their registers in order, and ptxas lets a later one overwrite an earlier one's
// address without waiting.
static bool queues(const Instruction& x) { return x.name == "LDS" || x.name == "LDSM"; }

void Warp::check_hazards(const Instruction& x, Mask m) {
  for (const uint16_t n : x.sources) {
    if (arriving[n].lanes & m)
      fault("reads a register (number " + std::to_string(n) + ") before its value has arrived");
  }
  for (const uint16_t n : x.destinations) {
    if (arriving[n].lanes & m) fault("writes a register (number " + std::to_string(n) + ") whose value is under way");
    if ((in_use[n].lanes & m) && !(in_use[n].queued && queues(x)))
      fault("writes a register (number " + std::to_string(n) + ") that is still being read");
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
    in_use[n].queued = queues(x) && (in_use[n].lanes == 0 || in_use[n].queued);
    in_use[n].lanes |= m, in_use[n].scoreboard = int8_t(x.reads),
                          in_use[n].other = int8_t(x.writes < 6 ? x.writes : -1);
    guarded[size_t(x.reads)].push_back(n);
    if (x.writes < 6) guarded[size_t(x.writes)].push_back(n);
  }
}

// ---- Time

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

}  // namespace mc

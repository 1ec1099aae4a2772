// machine.h - what runs: a program of decoded instructions, warps of 32 lanes, blocks with shared memory, one launch.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "memory.h"

namespace mc {

using Mask = uint32_t;  // a bit per lane
constexpr Mask kAll = ~Mask{0};
constexpr int kZero = 255;                            // RZ
constexpr uint32_t kSharedWindow = 0x01000000;        // high word of generic addresses of shared memory
constexpr int kUniform = 256, kPredicate = 320;       // numbers of UR0 and P0 among all registers, for hazards
constexpr int kUniformPredicate = 328, kNames = 336;  // of UP0; how many

struct alignas(64) Lanes {
  uint32_t v[32];
  uint32_t& operator[](int i) { return v[i]; }
  uint32_t operator[](int i) const { return v[i]; }
};

// What is assumed, in clocks and bytes. Mirrored by Python (clock.py), where the numbers and their sources are.
struct Model {
  double l2, dram, remote_shared, cluster_barrier, branch, hmma_every, bytes_per_clock;
  int64_t contention;  // warps share schedulers, the shared-memory port and the tensor cores
  int64_t cold;        // the first touch of a 128-byte line costs `dram` instead of `l2`: 1 of K and V, 2 of everything
};

struct Warp;
using Execute = std::function<void(Warp&, Mask)>;

struct Instruction {
  uint32_t address;
  std::string text, name;  // name: the opcode without modifiers
  int stage;
  int stall, writes, reads, waits;  // of the scheduling word: clocks, scoreboards set, mask of scoreboards waited for
  int guard = -1;                   // number of the guarding predicate, -1: none
  bool guard_inverted = false;
  std::vector<uint16_t> sources, destinations;  // registers by number
  Execute execute;                              // empty: unknown, with the reason in `unknown`
  std::string unknown;
  double latency;
  bool port = false, tensor = false;
  int counter;  // index into Launch::counts
};

struct Program {
  std::vector<Instruction> code;
  std::vector<std::string> counters;  // opcode names
  int capability;
  std::map<int, std::vector<uint8_t>> banks;  // of constants that the compiler laid out
};

struct Block;
struct Launch;

// Lanes of a warp that share a program counter.
struct Group {
  int pc;
  Mask mask;
};

struct StageClocks {
  double busy = 0, stalled = 0, slept = 0;
  int64_t issued = 0, entered = 0;
};

struct Warp {
  Warp(Block& block, int index);

  Block& block;
  const int index;
  std::array<Lanes, 256> R{};
  std::array<uint32_t, 64> UR{};
  std::array<Mask, 8> P{}, UP{};
  struct Convergence {
    Mask members = 0;
    int target = 0;
  };
  std::array<Convergence, 16> B{};

  // Lane groups. A divergent branch goes on with the lanes that fall through.
  int pc = 0;
  Mask mask = kAll, alive = kAll;
  std::deque<Group> ready;
  struct Waiting {
    int key;       // of a convergence barrier, or -1 - pc of a WARPSYNC
    Mask members;  // that a WARPSYNC waits for
    Mask mask;
    int following;
  };
  std::vector<Waiting> waiting;
  int spins = 0;
  void jump(int target, Mask m);
  void gather(const Waiting& arrived);  // goes on together when all members have come
  void release();                       // groups whose missing members have left
  void rotate();                        // lets other lanes run
  void exit(Mask m);

  // Time.
  double clock = 0, issued = 0, landed = 0, hold = 0;
  std::array<double, 6> scoreboard{};
  bool done = false, sleeping = false;
  bool moved = false, jumped = false;  // this instruction set pc; and at the price of a branch
  int64_t cluster_arrivals = 0;
  double cost = 1, latency = 0;
  int stage = -1;    // compiler-made functions count for whoever called them
  int polling = -1;  // pc of the NANOSLEEP of a loop that asks for a barrier's phase: asleep, for the clock
  std::vector<StageClocks> stages;
  double ready_at() const;
  void step(double at);
  void wake(double now);

  // Registers whose values are under way (scoreboard not yet waited for), or still being read. -1: none.
  struct Hazard {
    Mask lanes = 0;
    int8_t scoreboard = -1, other = -1;  // either frees it: what has arrived has been asked for with all its operands
    bool queued = false;                 // by loads of shared memory alone
  };
  std::array<Hazard, kNames> arriving{}, in_use{};
  std::array<std::vector<uint16_t>, 6> guarded;
  void wait_for(int scoreboards);
  void check_hazards(const Instruction& x, Mask m);
  void note_hazards(const Instruction& x, Mask m);

  const Instruction& instruction() const;
  [[noreturn]] void fault(const std::string& what) const;

 private:
  Mask members_of(const Waiting& w) const;
  bool resume(int key);
  void switch_group();
};

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet landed
  int phase = 0;
  std::vector<Warp*> waiting;
};

struct Block {
  Block(Launch& launch, int index, int rank, int warps, uint32_t shared_bytes);

  Launch& launch;
  const int index, rank;  // blockIdx.x, place in the cluster
  Shared shared;
  std::map<uint32_t, Barrier> barriers;
  std::vector<std::unique_ptr<Warp>> warps;
  double link = 0, port = 0;
  std::array<double, 4> slot{}, tensor{};
  std::map<int, std::vector<Warp*>> named;  // at BAR.SYNC
  std::vector<std::unique_ptr<Block>>* cluster = nullptr;

  uint32_t offset_of(uint64_t address) const;  // of a shared address, its rank taken off
  Block& owner_of(uint64_t address);
  Barrier& barrier(uint32_t offset);
  void arrive(uint32_t offset, int n, int64_t bytes = 0);
  bool running() const;
};

struct Event {
  double time;
  uint64_t order;
  std::function<void()> action;
  bool operator<(const Event& other) const { return time != other.time ? time > other.time : order > other.order; }
};

// One grid: its blocks run cluster by cluster, every block on an SM of its own.
struct Launch {
  Launch(const Program& program, Global& memory, const Model& model) : program(program), memory(memory), model(model) {}
  const Program& program;
  Global& memory;
  const Model model;
  int cluster_size = 1;
  std::vector<uint8_t> parameters;

  std::vector<int64_t> counts;  // warp instructions that ran for at least one lane, by opcode
  int64_t barriers = 0;         // meetings of warps at BAR.SYNC
  int64_t limit = 0;            // of instructions
  std::vector<bool> visited;    // instructions that ran for some lane
  int64_t copied = 0;           // 16-byte pieces, zeros among them
  int64_t instructions = 0;
  std::vector<StageClocks> stages;      // over all warps
  std::map<std::string, double> marks;  // when something first happened in its block
  double end = 0;                       // of the slowest block

  double now = 0, progress = 0;
  std::unordered_set<uint64_t> touched;  // 128-byte lines
  uint64_t order = 0;
  std::priority_queue<Event> events;
  std::vector<Warp*> cluster_waiting;
  int64_t cluster_phase = 0;
  int cluster_arrived = 0, cluster_warps = 0;
  double cluster_completed = 0;

  uint32_t constant(int bank, uint32_t at) const;
  void at(double time, std::function<void()> action);
  void mark(const std::string& what, double time) { marks.emplace(what, time); }
  double global_latency(const uint64_t* addresses, Mask m);            // from asking to arrival
  void run(int grid, int warps, uint32_t shared_bytes, int clusters);  // 0: all of them

 private:
  void run_cluster(int first_block, int warps, uint32_t shared_bytes);
  std::vector<uint32_t> constants_;
  std::vector<bool> known_;
  void set_constants(int grid, int warps);
};

}  // namespace mc

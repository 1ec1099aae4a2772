// latencies.h - the one table of assumed latencies: clocks until an instruction's scoreboard is released. Prefixes of
// opcodes; the first match counts.
//
// Sources: shared memory, shuffles and special functions from published microbenchmarks of Volta to Hopper (Jia et al.,
// "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018, arXiv:1804.06826; Luo et al.,
// "Benchmarking and dissecting the NVIDIA Hopper GPU architecture", 2024, arXiv:2402.13499), rounded; marked "guess"
// where neither has a figure. Fixed-latency instructions carry theirs in the stall counts and are not listed.
#pragma once
#include <cstring>
#include <string>

namespace mc {

struct LatencyClass {
  const char* prefix;
  double clocks;
  bool port;  // takes the load/store port of the SM, a wavefront a clock
};

inline constexpr LatencyClass kLatencies[] = {
    {"LDSM", 33, true},     {"LDS.128", 30, true},
    {"LDS.64", 26, true},   {"LDS", 24, true},
    {"STS", 20, true},      {"SHFL", 24, true},
    {"MUFU", 20, false},    {"S2R", 22, false},
    {"S2UR", 25, false},    {"LDC", 28, false},
    {"ULDC", 10, false},    {"SYNCS.PHASECHK", 22, false},  // guess
    {"SYNCS", 12, false},                                   // guess
    {"ATOMS", 30, true},    {"I2F", 16, false},
    {"F2I", 16, false},     {"R2UR", 10, false},
    {"MOVM", 30, true},     {"LDGSTS", 20, true},  // until its registers are free; the data takes l2 or dram
    {"ARRIVES", 20, false},                        // guess
    {"POPC", 10, false},    {"FLO", 10, false},
    {"HMMA", 33, false},    {"MEMBAR.ALL.GPU", 500, false},  // guess
    {"MEMBAR", 30, false},                                   // guess
    {"DEPBAR", 10, false},  {"LDGDEPBAR", 10, false},
    {"UBLKCP", 20, false},  {"LD", 20, true},  // of the access itself: l2, dram or remote_shared
    {"ST", 20, true},       {"", 20, false},
};

inline const LatencyClass& latency_class(const std::string& opcode) {
  for (const LatencyClass& c : kLatencies) {
    if (std::strncmp(opcode.c_str(), c.prefix, std::strlen(c.prefix)) == 0) return c;
  }
  return kLatencies[0];  // not reached: the last prefix is empty
}

}  // namespace mc

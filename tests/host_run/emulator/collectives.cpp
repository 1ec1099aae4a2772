// collectives.cpp - operations that all lanes of a mask execute together: shuffles, votes, __syncwarp, and the matrix
// instructions with the fragment layouts of the PTX ISA. The last lane to arrive computes for all.
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

namespace {

constexpr int kVote = 16;  // variant of a vote; a shuffle's is its kind

const char* op_text(Op op) {
  switch (op) {
    case kShfl:
      return "shuffle or vote";
    case kLdsm:
      return "ldmatrix";
    case kMovm:
      return "movmatrix";
    case kMma:
      return "mma";
    default:
      return "__syncwarp";
  }
}

// `run(collective)` once all lanes of the mask have come. Lanes meet where operation, `variant` and mask are the same,
// and for `aligned` instructions also the place. Other lanes may meanwhile meet elsewhere under masks of their own.
template <class Run>
void meet(Thread& self, Op op, int variant, unsigned mask, const void* argument, SiteId site, bool aligned, Run run) {
  Warp& warp = *self.warp;
  const unsigned me = 1u << self.lane;
  if (!(mask & me)) finding("mask", site, "thread %d is not in its own mask %08x", self.index, mask);
  if (mask & ~warp.live) {
    finding("mask", site, "mask %08x names lanes that have exited (live %08x)", mask, warp.live);
    mask &= warp.live;
  }
  mask |= me;
  size_t i = 0;
  for (; i < warp.collectives.size(); ++i) {
    const Collective& c = warp.collectives[i];
    const bool same = c.op == op && c.variant == variant && c.mask == mask && (!aligned || c.site == site);
    if (same && !(c.arrived & me)) break;
    // Someone that this lane needs waits there for this lane: neither can ever complete.
    if ((c.mask & me) && (c.arrived & mask)) {
      finding("divergent-collective", site, "warp %d: lane %d in %s with mask %08x, others in %s at %s with mask %08x",
              warp.index, self.lane, op_text(op), mask, op_text(c.op), location(c.site).c_str(), c.mask);
    }
  }
  if (i == warp.collectives.size()) warp.collectives.push_back({op, variant, mask, 0, site, {}});
  Collective& c = warp.collectives[i];
  c.arguments[self.lane] = argument;
  c.arrived |= 1u << self.lane;
  if ((c.arrived & c.mask) != c.mask) {
    block_current(op_text(op), site);
    return;
  }
  const Collective complete = c;
  warp.collectives.erase(warp.collectives.begin() + i);
  if (complete.mask == warp.live) flush_requests(warp);
  if (!aligned || complete.mask == kFullMask) run(complete);  // a matrix instruction without all lanes has no meaning
  if (op != kLdsm) {  // ldmatrix has addresses and counted them as the lanes came
    if (engine.settings.trace) note_event(self, op, site);
    count(op, site, {1, 0, 0, 0, 0, uint64_t(__builtin_popcount(complete.mask))});
  }
  Block& block = *warp.block;
  for (unsigned lanes = complete.mask; lanes; lanes &= lanes - 1)
    set_ready(block.thread[warp.index * 32 + __builtin_ctz(lanes)]);
}

struct ShuffleArguments {
  Thread* thread;
  Shuffle kind;
  int argument, width;
  uint64_t value;
};

uint64_t shuffled(const Collective& c, int lane) {
  const auto& a = *static_cast<const ShuffleArguments*>(c.arguments[lane]);
  const int first = lane / a.width * a.width, last = first + a.width - 1;
  int source = lane;
  switch (a.kind) {
    case Shuffle::kXor:
      source = lane ^ a.argument;
      break;
    case Shuffle::kIndex:
      source = first + (a.argument & (a.width - 1));
      break;
    case Shuffle::kUp:
      source = lane - a.argument < first ? lane : lane - a.argument;
      break;
    case Shuffle::kDown:
      source = lane + a.argument > last ? lane : lane + a.argument;
      break;
  }
  if (source > last) source = lane;
  if (!(c.mask >> source & 1)) {
    finding("mask", c.site, "lane %d shuffles from lane %d, which is not in mask %08x", lane, source, c.mask);
    return ~uint64_t(0);
  }
  return static_cast<const ShuffleArguments*>(c.arguments[source])->value;
}

struct LdmatrixArguments {
  uint32_t* r;
  bool transposed;
  const void* row;
};

struct MmaArguments {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
  bool bfloat16;
};

float from_bfloat16(uint32_t bits) {
  const uint32_t word = bits << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

const float* half_table() {
  static std::vector<float> values;
  if (values.empty()) {
    for (int i = 0; i < 65536; ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      values.push_back(__half2float(__half(raw)));
    }
  }
  return values.data();
}

void multiply(const Collective& c) {
  float a[16][16], b[16][8], d[16][8];
  const bool bfloat16 = static_cast<const MmaArguments*>(c.arguments[__builtin_ctz(c.mask)])->bfloat16;
  const float* halves = half_table();
  const auto value = [&](uint32_t word, int e) {
    const uint32_t bits = word >> 16 * e & 0xffff;
    return bfloat16 ? from_bfloat16(bits) : halves[bits];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& m = *static_cast<const MmaArguments*>(c.arguments[lane]);
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int e = 0; e < 2; ++e) {
      a[g][t + e] = value(m.a[0], e);
      a[g + 8][t + e] = value(m.a[1], e);
      a[g][t + 8 + e] = value(m.a[2], e);
      a[g + 8][t + 8 + e] = value(m.a[3], e);
      b[t + e][g] = value(m.b0, e);
      b[t + 8 + e][g] = value(m.b1, e);
      d[g][t + e] = m.d[e];
      d[g + 8][t + e] = m.d[2 + e];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float x = a[row][k];
      for (int n = 0; n < 8; ++n) d[row][n] += x * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& m = *static_cast<const MmaArguments*>(c.arguments[lane]);
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int e = 0; e < 2; ++e) {
      m.d[e] = d[g][t + e];
      m.d[2 + e] = d[g + 8][t + e];
    }
  }
}

}  // namespace

void warp_sync(unsigned mask, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  if (sync_dropped(kWarpsync, site)) return;
  meet(self, kWarpsync, 0, mask, nullptr, site, false, [&](const Collective& c) {
    if (!engine.settings.check) return;
    int threads[32], n = 0;
    for (unsigned lanes = c.mask; lanes; lanes &= lanes - 1)
      threads[n++] = self.warp->index * 32 + __builtin_ctz(lanes);
    struct {
      const int *first, *last;
      const int* begin() const { return first; }
      const int* end() const { return last; }
    } range{threads, threads + n};
    self.block->clocks.synchronise(range);
  });
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int argument, int width, Site where) {
  Thread& self = current();
  const ShuffleArguments arguments{&self, kind, argument, width, value};
  self.result = value;
  meet(self, kShfl, int(kind), mask, &arguments, intern(where), false, [](const Collective& c) {
    for (unsigned lanes = c.mask; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      static_cast<const ShuffleArguments*>(c.arguments[lane])->thread->result = shuffled(c, lane);
    }
  });
  return self.result;
}

unsigned ballot(unsigned mask, bool predicate, Site where) {
  Thread& self = current();
  const ShuffleArguments arguments{&self, Shuffle::kIndex, 0, 32, predicate};
  meet(self, kShfl, kVote, mask, &arguments, intern(where), false, [](const Collective& c) {
    unsigned votes = 0;
    const auto argument = [&](int lane) { return static_cast<const ShuffleArguments*>(c.arguments[lane]); };
    for (unsigned lanes = c.mask; lanes; lanes &= lanes - 1)
      votes |= unsigned(argument(__builtin_ctz(lanes))->value) << __builtin_ctz(lanes);
    for (unsigned lanes = c.mask; lanes; lanes &= lanes - 1) argument(__builtin_ctz(lanes))->thread->result = votes;
  });
  return unsigned(self.result);
}

void ldmatrix_x4(uint32_t* r, bool transposed, const void* row, Site where) {
  Thread& self = current();
  const SiteId site = intern(where);
  SharedPlace place;
  const bool readable = in_shared_arena(row) ? shared_read(self, row, 16, site, &place) : false;
  if (!in_shared_arena(row))
    finding("smem-oob", site, "thread %d: an ldmatrix row outside of shared memory", self.index);
  if (readable && place.block != self.block)
    finding("dsmem", site, "thread %d: ldmatrix reads its own block only", self.index);
  note(self, kLdsm, site, readable ? place.offset : kNoAddress, 16);
  static const uint64_t poison[2] = {~0ull, ~0ull};
  const LdmatrixArguments arguments{r, transposed, readable ? row : poison};
  meet(self, kLdsm, transposed, kFullMask, &arguments, site, true, [](const Collective& c) {
    uint16_t matrices[4][8][8];
    const auto argument = [&](int lane) { return static_cast<const LdmatrixArguments*>(c.arguments[lane]); };
    for (int lane = 0; lane < 32; ++lane) memcpy(matrices[lane >> 3][lane & 7], argument(lane)->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane >> 2, t = (lane & 3) * 2;
      for (int i = 0; i < 4; ++i) {
        const auto& m = matrices[i];
        const uint32_t low = argument(lane)->transposed ? m[t][g] : m[g][t];
        const uint32_t high = argument(lane)->transposed ? m[t + 1][g] : m[g][t + 1];
        argument(lane)->r[i] = low | high << 16;
      }
    }
  });
}

uint32_t movmatrix_trans(uint32_t value, Site where) {
  Thread& self = current();
  const ShuffleArguments arguments{&self, Shuffle::kIndex, 0, 32, value};
  meet(self, kMovm, 0, kFullMask, &arguments, intern(where), true, [](const Collective& c) {
    uint16_t matrix[8][8];
    const auto argument = [&](int lane) { return static_cast<const ShuffleArguments*>(c.arguments[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      matrix[lane >> 2][(lane & 3) * 2] = uint16_t(argument(lane)->value);
      matrix[lane >> 2][(lane & 3) * 2 + 1] = uint16_t(argument(lane)->value >> 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane >> 2, t = (lane & 3) * 2;
      argument(lane)->thread->result = matrix[t][g] | uint32_t(matrix[t + 1][g]) << 16;
    }
  });
  return uint32_t(self.result);
}

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site where) {
  Thread& self = current();
  const MmaArguments arguments{d, a, b0, b1, bfloat16};
  meet(self, kMma, bfloat16, kFullMask, &arguments, intern(where), true, multiply);
}

}  // namespace nsa_sel::emu

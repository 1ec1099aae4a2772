// ops_memory.cpp - loads, stores and asynchronous copies. Loads give their value at once and their latency to the
// clock; a copy's bytes appear in shared memory when it lands, and until then nobody may touch them.
#include <algorithm>
#include <cstring>

#include "decode.h"

namespace mc {
namespace {

// Passes through the 32 banks, in groups of lanes that share a pass at best: 32, 16 or 8 for 4, 8 or 16 bytes.
double wavefronts(const uint64_t (&at)[32], Mask m, int bytes) {
  const int words = std::max(1, bytes / 4), lanes = 32 / words;
  int index = 0, total = 0;
  std::vector<uint32_t> wanted;
  const auto flush = [&] {
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    int used[32] = {}, most = 0;
    for (const uint32_t word : wanted) most = std::max(most, ++used[word & 31]);
    total += most;
    wanted.clear();
  };
  each(m, [&](int i) {
    for (int k = 0; k < words; ++k) wanted.push_back(uint32_t(at[i] >> 2) + uint32_t(k));
    if (++index % lanes == 0) flush();
  });
  if (!wanted.empty()) flush();
  return std::max(1, total);
}

bool is_shared_window(uint64_t address) { return address >> 32 == kSharedWindow; }

// A register's share of a value that was loaded, widened.
uint32_t widen(const uint8_t* from, int bytes, bool is_signed, int word) {
  uint32_t value = 0;
  std::memcpy(&value, from + 4 * word, size_t(std::min(bytes, 4)));
  if (bytes == 1 && is_signed) value = uint32_t(int32_t(int8_t(value)));
  if (bytes == 2 && is_signed) value = uint32_t(int32_t(int16_t(value)));
  return value;
}

Execute access(Decoder& x) {
  const std::string& name = x.instruction().name;
  const bool load = name[0] == 'L', to_shared = name.back() == 'S', generic = name.size() == 2;
  const int bytes = x.bytes(), words = std::max(1, bytes / 4);
  const bool is_signed = x.has("S8") || x.has("S16");
  const Target d = load ? x.target(words) : Target{};
  const Address address = x.address();
  const Source value = load ? Source{} : x.source(words);
  return [=](Warp& w, Mask m) {
    uint64_t at[32];
    address(w, at);
    Block& block = w.block;
    Launch& launch = block.launch;
    const bool shared = to_shared || (generic && is_shared_window(at[first_lane(m)]));
    Lanes loaded[4] = {}, stored[4];
    for (int k = 0; !load && k < words; ++k) stored[k] = value(w, k);
    each(m, [&](int i) {
      uint8_t data[16];
      if (!load)
        for (int k = 0; k < words; ++k) std::memcpy(data + 4 * k, &stored[k].v[i], 4);
      if (shared != (to_shared || (generic && is_shared_window(at[i])))) w.fault("lanes in two memories");
      if (shared) {
        Block& owner = to_shared ? block : block.owner_of(at[i]);
        const uint32_t offset = to_shared ? block.offset_of(at[i] & 0xffffffffu) : uint32_t(at[i] & 0xffffff);
        if (load) {
          owner.shared.read(offset, data, bytes);
        } else {
          owner.shared.write(offset, data, bytes);
          if (bytes == 8) owner.barriers.erase(offset);  // below sm_90 a store initialises an mbarrier
        }
      } else if (load) {
        launch.memory.read(at[i], data, bytes);
      } else {
        launch.memory.write(at[i], data, bytes);
      }
      for (int k = 0; load && k < words; ++k) loaded[k][i] = widen(data, bytes, is_signed, k);
    });
    for (int k = 0; load && k < words; ++k) d.put(w, loaded[k], m, k);
    if (!load) launch.progress = w.issued;
    if (shared) {
      w.cost = wavefronts(at, m, bytes);
      if (generic && load) w.latency = launch.model.remote_shared;
      if (generic && !load) w.latency = 20;
    } else if (load) {
      w.latency = launch.global_latency(at, m);
      launch.mark("load of " + launch.memory.name_of(at[first_lane(m)]), w.issued);
    }
  };
}
const Opcode accesses({"LD", "LDG", "LDS", "ST", "STG", "STS"},
                      {"E", "64", "128", "U8", "S8", "U16", "S16", "16", "CONSTANT", "STRONG", "GPU", "SYS", "EF", "EL",
                       "NA"},
                      access);

const Opcode ldsm({"LDSM"}, {"16", "M88", "MT88", "2", "4"}, [](Decoder& x) -> Execute {
  const int matrices = x.has("4") ? 4 : x.has("2") ? 2 : 1;
  const bool turned = x.has("MT88");
  const Target d = x.target(matrices);
  const Address address = x.address();
  return [=](Warp& w, Mask m) {
    if (m != kAll) w.fault("LDSM with " + std::to_string(__builtin_popcount(m)) + " lanes");
    uint64_t at[32];
    address(w, at);
    w.cost = 0;
    for (int k = 0; k < matrices; ++k) {
      uint16_t rows[8][8];
      const Mask lanes = Mask{255} << 8 * k;
      for (int row = 0; row < 8; ++row)
        w.block.shared.read(w.block.offset_of(at[8 * k + row] & 0xffffffffu), rows[row], 16);
      w.cost += wavefronts(at, lanes, 16);
      Lanes r;
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4, column = 2 * (i % 4);
        r[i] = turned ? rows[column][row] | uint32_t(rows[column + 1][row]) << 16
                      : rows[row][column] | uint32_t(rows[row][column + 1]) << 16;
      }
      d.put(w, r, m, k);
    }
  };
});

// Predicate false (or absent lanes of the source): zeros, and the source is not touched.
const Opcode ldgsts({"LDGSTS"}, {"E", "BYPASS", "128", "64", "LTC128B", "LTC256B", "LTC64B"},
                    [](Decoder& x) -> Execute {
                      const int bytes = x.bytes();
                      const Address to = x.address(), from = x.address();
                      const PredicateSource valid = x.more() ? x.predicate() : PredicateSource{};
                      return [=](Warp& w, Mask m) {
                        Block& block = w.block;
                        Launch& launch = block.launch;
                        uint64_t dst[32], src[32];
                        to(w, dst), from(w, src);
                        const Mask real = m & valid(w);
                        double latency = 20;
                        if (real != 0) {
                          latency = launch.global_latency(src, real);
                          launch.mark("copy of " + launch.memory.name_of(src[first_lane(real)]), w.issued);
                        }
                        struct Piece {
                          uint32_t offset;
                          uint8_t data[16];
                        };
                        std::vector<Piece> pieces;
                        each(m, [&](int i) {
                          Piece p{block.offset_of(dst[i] & 0xffffffffu), {}};
                          if (real >> i & 1) launch.memory.read(src[i], p.data, bytes);
                          block.shared.begin_copy(p.offset, bytes);
                          pieces.push_back(p);
                        });
                        w.cost = wavefronts(dst, m, bytes);
                        block.link = std::max(block.link, w.issued) +
                                     bytes * __builtin_popcount(real) / launch.model.bytes_per_clock;
                        w.landed = std::max(w.landed, block.link + latency);
                        launch.copied += int64_t(pieces.size());
                        launch.at(block.link + latency, [&block, bytes, pieces] {
                          for (const Piece& p : pieces) block.shared.end_copy(p.offset, p.data, bytes);
                        });
                      };
                    });

// Every lane arrives once at the mbarrier when its earlier copies have landed.
const Opcode arrives({"ARRIVES"}, {"LDGSTSBAR", "64", "ARVCNT"}, [](Decoder& x) -> Execute {
  const Address address = x.address();
  return [=](Warp& w, Mask m) {
    uint64_t at[32];
    address(w, at);
    Block& block = w.block;
    const uint32_t offset = block.offset_of(at[first_lane(m)] & 0xffffffffu);
    block.barrier(offset);
    const int n = __builtin_popcount(m);
    block.launch.at(std::max(w.landed, w.issued), [&block, offset, n] { block.arrive(offset, n); });
  };
});

const Opcode ldgdepbar({"LDGDEPBAR"}, {}, [](Decoder&) -> Execute { return [](Warp&, Mask) {}; });

const Opcode depbar({"DEPBAR"}, {"LE"}, [](Decoder& x) -> Execute {
  const std::string name = x.text();
  if (name != "SB0" || x.number() != 0) throw Unknown("form of DEPBAR");
  return [](Warp& w, Mask) {
    w.hold = w.landed;
    w.wait_for(1);
  };
});

// A bulk copy: destination and mbarrier in one uniform pair, source in another, 16-byte units in a third register.
const Opcode ublkcp({"UBLKCP"}, {"S", "G"}, [](Decoder& x) -> Execute {
  const auto base = [&] {
    const std::string t = x.text();
    if (t.rfind("[UR", 0) != 0) throw Unknown("operand " + t);
    const int n = std::stoi(t.substr(3));
    for (int k = 0; k < 2; ++k) x.instruction().sources.push_back(uint16_t(kUniform + n + k));
    return size_t(n);
  };
  const size_t to = base(), from = base();
  const Source size = x.source();
  return [=](Warp& w, Mask) {
    Block& block = w.block;
    Launch& launch = block.launch;
    const uint32_t offset = block.offset_of(w.UR[to]), barrier = block.offset_of(w.UR[to + 1]);
    const uint64_t source = w.UR[from] | uint64_t(w.UR[from + 1]) << 32;
    const int bytes = int(size.raw(w, 0)) * 16;
    std::vector<uint8_t> data(static_cast<size_t>(bytes));
    for (int i = 0; i < bytes; i += 16) {
      launch.memory.read(source + uint64_t(i), &data[size_t(i)], 16);
      block.shared.begin_copy(offset + uint32_t(i), 16);
    }
    uint64_t lines[32] = {source};
    launch.mark("copy of " + launch.memory.name_of(source), w.issued);
    block.link = std::max(block.link, w.issued) + bytes / launch.model.bytes_per_clock;
    launch.copied += bytes / 16;
    launch.at(block.link + launch.global_latency(lines, 1), [&block, offset, barrier, data] {
      for (size_t i = 0; i < data.size(); i += 16) block.shared.end_copy(offset + uint32_t(i), &data[i], 16);
      block.arrive(barrier, 0, -int64_t(data.size()));
    });
  };
});

}  // namespace
}  // namespace mc

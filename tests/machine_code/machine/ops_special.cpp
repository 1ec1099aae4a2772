// ops_special.cpp - predicates as bits, votes, special registers and constants.
#include <algorithm>
#include <map>

#include "decode.h"

namespace mc {
namespace {

const Opcode p2r({"P2R"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  if (x.text() != "PR") throw Unknown("form of P2R");
  const Source a = x.source();
  const uint32_t keep = x.number();
  for (int n = 0; n < 7; ++n)
    if (keep >> n & 1) x.instruction().sources.push_back(uint16_t(kPredicate + n));
  return [=](Warp& w, Mask m) {
    Lanes r = a(w);
    for (int i = 0; i < 32; ++i) {
      uint32_t bits = 0;
      for (size_t n = 0; n < 7; ++n) bits |= (w.P[n] >> i & 1) << n;
      r[i] = (r[i] & ~keep) | (bits & keep);
    }
    d.put(w, r, m);
  };
});

const Opcode r2p({"R2P"}, {}, [](Decoder& x) -> Execute {
  if (x.text() != "PR") throw Unknown("form of R2P");
  const Source a = x.source();
  const uint32_t keep = x.number();
  for (int n = 0; n < 7; ++n)
    if (keep >> n & 1) x.instruction().destinations.push_back(uint16_t(kPredicate + n));
  return [=](Warp& w, Mask m) {
    const Lanes r = a(w);
    for (int n = 0; n < 7; ++n) {
      if (!(keep >> n & 1)) continue;
      Mask set = 0;
      for (int i = 0; i < 32; ++i) set |= (r[i] >> n & 1) << i;
      PredicateTarget{n, false}.put(w, set, m);
    }
  };
});

// The mask of active lanes whose predicate holds, and whether any (all) do.
Execute vote(Decoder& x) {
  const Target d = x.next_is_register() ? x.target() : Target{};
  const PredicateTarget any = x.predicate_target();
  const PredicateSource p = x.predicate();
  const bool all = x.has("ALL");
  return [=](Warp& w, Mask m) {
    const Mask votes = p(w) & m;
    Lanes r;
    for (int i = 0; i < 32; ++i) r[i] = votes;
    any.put(w, (all ? votes == m : votes != 0) ? kAll : 0, m);
    d.put(w, r, m);
  };
}
const Opcode votes({"VOTE", "VOTEU"}, {"ANY", "ALL"}, vote);

// One value of all active lanes, in a uniform register.
const Opcode redux({"REDUX"}, {"OR", "SUM", "MAX"}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const Source a = x.source();
  const bool sum = x.has("SUM"), most = x.has("MAX");  // MAX: unsigned
  return [=](Warp& w, Mask m) {
    const Lanes values = a(w);
    uint32_t total = 0;
    for (int i = 0; i < 32; ++i) {
      if (m >> i & 1) total = sum ? total + values[i] : most ? std::max(total, values[i]) : total | values[i];
    }
    Lanes r;
    for (int i = 0; i < 32; ++i) r[i] = total;
    d.put(w, r, m);
  };
});

// One of the active lanes is chosen: the lowest.
const Opcode elect({"ELECT"}, {}, [](Decoder& x) -> Execute {
  const PredicateTarget p = x.predicate_target();
  const Target d = x.target();
  if (x.more()) x.text();
  return [=](Warp& w, Mask m) {
    Lanes r;
    for (int i = 0; i < 32; ++i) r[i] = uint32_t(first_lane(m));
    p.put(w, Mask{1} << first_lane(m), m);
    d.put(w, r, m);
  };
});

const Opcode cs2r({"CS2R"}, {"32"}, [](Decoder& x) -> Execute {
  const bool one = x.has("32");
  const Target d = x.target(one ? 1 : 2);
  if (x.text() != "SRZ") throw Unknown("special register of CS2R");
  return [=](Warp& w, Mask m) {
    d.put(w, Lanes{}, m);
    if (!one) d.put(w, Lanes{}, m, 1);
  };
});

const Opcode s2r({"S2R", "S2UR"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const std::string name = x.text();
  using Read = uint32_t (*)(const Warp&, int);
  static const std::map<std::string, Read> known = {
      {"SR_TID.X", [](const Warp& w, int lane) { return uint32_t(w.index * 32 + lane); }},
      {"SR_TID.Y", [](const Warp&, int) { return 0u; }},
      {"SR_TID.Z", [](const Warp&, int) { return 0u; }},
      {"SR_CTAID.X", [](const Warp& w, int) { return uint32_t(w.block.index); }},
      {"SR_CTAID.Y", [](const Warp&, int) { return 0u; }},
      {"SR_CTAID.Z", [](const Warp&, int) { return 0u; }},
      {"SR_CgaCtaId", [](const Warp& w, int) { return uint32_t(w.block.rank); }},
      {"SR_SWINHI", [](const Warp&, int) { return kSharedWindow; }},
      {"SR_LANEID", [](const Warp&, int lane) { return uint32_t(lane); }},
  };
  const auto found = known.find(name);
  if (found == known.end()) throw Unknown("special register " + name);
  const Read read = found->second;
  return [=](Warp& w, Mask m) {
    Lanes r;
    for (int i = 0; i < 32; ++i) r[i] = read(w, i);
    d.put(w, r, m);
  };
});

const Opcode ldc({"LDC"}, {"64"}, [](Decoder& x) -> Execute {
  const int words = x.has("64") ? 2 : 1;
  const Target d = x.target(words);
  const Source a = x.source();
  return [=](Warp& w, Mask m) {
    for (int k = 0; k < words; ++k) d.put(w, a(w, k), m, k);
  };
});

}  // namespace
}  // namespace mc

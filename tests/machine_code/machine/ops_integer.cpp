// ops_integer.cpp - integers, bits and compares, of lanes and of the uniform datapath.
#include <algorithm>

#include "decode.h"

namespace mc {
namespace {

int32_t signed32(uint32_t x) { return int32_t(x); }

const Opcode mov({"MOV"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  return map1(d, x.source(), [](uint32_t a) { return a; });
});

// One lane's value for all. The form with a predicate is for loops over the lanes: true where the value is another one.
const Opcode r2ur({"R2UR"}, {}, [](Decoder& x) -> Execute {
  const auto others = x.predicate_targets();
  const Target d = x.target();
  const Source a = x.source();
  return [=](Warp& w, Mask m) {
    const Lanes r = a(w);
    Mask differs = 0;
    for (int i = 0; i < 32; ++i) differs |= Mask(r[i] != r[first_lane(m)]) << i;
    d.put(w, r, m);
    for (const PredicateTarget& p : others) p.put(w, differs, m);
  };
});

// Sums with carries: every predicate behind the target is a carry out, every one behind the terms a carry in.
Execute add3(Decoder& x) {
  const Target d = x.target();
  const auto carries = x.predicate_targets();
  const Source a = x.source(), b = x.source(), c = x.source();
  std::vector<PredicateSource> extra;
  while (x.more()) extra.push_back(x.predicate());
  if (!extra.empty() && !x.has("X")) throw Unknown("carry in without .X");
  return [=](Warp& w, Mask m) {
    uint64_t total[32] = {};
    for (const Source* s : {&a, &b, &c}) s->add_to(w, total);
    for (const PredicateSource& p : extra) {
      const Mask set = p(w);
      for (int i = 0; i < 32; ++i) total[i] += set >> i & 1;
    }
    Lanes r;
    for (int i = 0; i < 32; ++i) r[i] = uint32_t(total[i]);
    for (size_t k = 0; k < carries.size(); ++k) {
      Mask carry = 0;
      for (int i = 0; i < 32; ++i) carry |= Mask(total[i] >> 32 > k) << i;
      carries[k].put(w, carry, m);
    }
    d.put(w, r, m);
  };
}
const Opcode iadd3({"IADD3"}, {"X"}, add3);

const Opcode viadd({"VIADD", "IADD"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const Source a = x.source();
  return map2(d, a, x.source(), [](uint32_t p, uint32_t q) { return p + q; });
});

const Opcode imad({"IMAD"}, {"MOV", "U32", "IADD", "SHL", "X", "HI", "WIDE"}, [](Decoder& x) -> Execute {
  const bool wide = x.has("WIDE"), high = x.has("HI"), is_unsigned = x.has("U32");
  const Target d = x.target(wide ? 2 : 1);
  const auto carries = x.predicate_targets();
  const Source a = x.source(), b = x.source(), c = x.source(wide || high ? 2 : 1);
  if (!wide && !high) {
    if (!carries.empty()) throw Unknown("carry out of a 32-bit IMAD");
    if (!x.has("X")) return map3(d, a, b, c, [](uint32_t p, uint32_t q, uint32_t r) { return p * q + r; });
    const PredicateSource carry = x.predicate();
    return [=](Warp& w, Mask m) {
      Lanes r = a(w);
      const Lanes y = b(w), z = c(w);
      const Mask set = carry(w);
      for (int i = 0; i < 32; ++i) r[i] = r[i] * y[i] + z[i] + (set >> i & 1);
      d.put(w, r, m);
    };
  }
  if (x.more() || c.negate || c.invert || (!carries.empty() && !is_unsigned)) throw Unknown("form of IMAD");
  return [=](Warp& w, Mask m) {
    const Lanes p = a(w), q = b(w), z0 = c(w), z1 = c(w, 1);
    Lanes low, top;
    Mask carry = 0;
    for (int i = 0; i < 32; ++i) {
      const uint64_t product = is_unsigned ? uint64_t(p[i]) * q[i] : uint64_t(int64_t(signed32(p[i])) * signed32(q[i]));
      const uint64_t sum = product + (z0[i] | uint64_t(z1[i]) << 32);
      carry |= Mask(sum < product) << i;
      low[i] = uint32_t(sum), top[i] = uint32_t(sum >> 32);
    }
    for (const PredicateTarget& t : carries) t.put(w, carry, m);
    d.put(w, high ? top : low, m);
    if (wide) d.put(w, top, m, 1);
  };
});

Execute minmax(Decoder& x) {
  const bool is_unsigned = x.has("U32"), relu = x.has("RELU"), sum = x.instruction().name == "VIADDMNMX";
  const Target d = x.target();
  const Source a = x.source(), b = x.source(), c = sum ? x.source() : b;
  const PredicateSource least = x.predicate();
  return [=](Warp& w, Mask m) {
    Lanes p = a(w), q = b(w), r;
    if (sum) {
      for (int i = 0; i < 32; ++i) p[i] += q[i];
      q = c(w);
    }
    const Mask min = least(w);
    for (int i = 0; i < 32; ++i) {
      const bool less = is_unsigned ? p[i] < q[i] : signed32(p[i]) < signed32(q[i]);
      r[i] = less == bool(min >> i & 1) ? p[i] : q[i];
      if (relu && signed32(r[i]) < 0) r[i] = 0;
    }
    d.put(w, r, m);
  };
}
const Opcode vimnmx({"VIMNMX", "VIADDMNMX", "IMNMX"}, {"U32", "RELU"}, minmax);

const Opcode iabs({"IABS"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  return map1(d, x.source(), [](uint32_t a) { return int32_t(a) < 0 ? 0u - a : a; });
});

// (a << shift) + b, or with HI the high word of {c, a} << shift, plus b.
const Opcode lea({"LEA"}, {"HI", "X", "SX32"}, [](Decoder& x) -> Execute {
  const bool high = x.has("HI"), extend = x.has("SX32");
  const Target d = x.target();
  const auto carries = x.predicate_targets();
  const Source a = x.source(), b = x.source();
  const bool three = high && !extend;
  const Source c = three ? x.source() : Source{};
  const uint32_t shift = x.number();
  std::vector<PredicateSource> extra;
  while (x.more()) extra.push_back(x.predicate());
  if (a.negate || c.negate || (!extra.empty() && !x.has("X"))) throw Unknown("form of LEA");
  return [=](Warp& w, Mask m) {
    uint64_t total[32] = {};
    const Lanes p = a(w), q = c(w);
    b.add_to(w, total);
    Lanes r;
    Mask carry = 0;
    const Mask in = extra.empty() ? 0 : extra[0](w);
    for (int i = 0; i < 32; ++i) {
      const uint64_t top = extend ? uint64_t(signed32(p[i]) < 0 ? ~0u : 0u) : q[i];
      const uint64_t first = high ? uint32_t((top << 32 | p[i]) >> (32 - shift)) : uint32_t(p[i] << shift);
      total[i] += first + (in >> i & 1);
      r[i] = uint32_t(total[i]);
      carry |= Mask(total[i] >> 32 > 0) << i;
    }
    for (const PredicateTarget& t : carries) t.put(w, carry, m);
    d.put(w, r, m);
  };
});

uint32_t lut3(uint32_t a, uint32_t b, uint32_t c, uint32_t lut) {
  uint32_t r = 0;
  for (int k = 0; k < 8; ++k) {
    if (lut >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return r;
}

const Opcode lop3({"LOP3"}, {"LUT"}, [](Decoder& x) -> Execute {
  const auto nonzero = x.predicate_targets();
  const Target d = x.target();
  const Source a = x.source(), b = x.source(), c = x.source();
  const uint32_t lut = x.number();
  const PredicateSource also = x.predicate();
  if (lut == 0xc0 && nonzero.empty()) return map2(d, a, b, [](uint32_t p, uint32_t q) { return p & q; });
  return [=](Warp& w, Mask m) {
    Lanes r = a(w);
    const Lanes y = b(w), z = c(w);
    Mask set = also(w);
    for (int i = 0; i < 32; ++i) r[i] = lut3(r[i], y[i], z[i], lut);
    for (int i = 0; i < 32; ++i) set |= Mask(r[i] != 0) << i;
    for (const PredicateTarget& t : nonzero) t.put(w, set, m);
    d.put(w, r, m);
  };
});

const Opcode plop3({"PLOP3"}, {"LUT"}, [](Decoder& x) -> Execute {
  const PredicateTarget p = x.predicate_target(), q = x.predicate_target();
  const PredicateSource a = x.predicate(), b = x.predicate(), c = x.predicate();
  const uint32_t first = x.number(), second = x.number();
  return [=](Warp& w, Mask m) {
    const Mask u = a(w), v = b(w), z = c(w);
    p.put(w, lut3(u, v, z, first), m);
    q.put(w, lut3(u, v, z, second), m);
  };
});

// .F, .L, .R and their kind: clamped to the width unless .W.
const Opcode shf({"SHF"}, {"L", "R", "U32", "U64", "S32", "S64", "HI", "W"}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const Source low = x.source(), by = x.source(), high = x.source();
  const bool left = x.has("L"), top = x.has("HI"), arithmetic = x.has("S32") || x.has("S64"), wrap = x.has("W");
  const uint32_t width = x.has("U64") || x.has("S64") ? 64 : 32;
  return map3(d, low, by, high, [=](uint32_t a, uint32_t s, uint32_t c) -> uint32_t {
    s = wrap ? s & (width - 1) : std::min(s, width);
    const uint64_t both = uint64_t(c) << 32 | a;
    uint64_t r;
    if (left) {
      r = s >= 64 ? 0 : both << s;
    } else if (arithmetic) {
      r = uint64_t(int64_t(both) >> std::min(s, 63u));
    } else {
      r = s >= 64 ? 0 : both >> s;
    }
    return uint32_t(top ? r >> 32 : r);
  });
});

const Opcode prmt({"PRMT"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const Source a = x.source(), pick = x.source(), c = x.source();
  return map3(d, a, pick, c, [](uint32_t low, uint32_t s, uint32_t high) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t r = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t nibble = s >> 4 * k & 15;
      uint32_t byte = uint32_t(both >> 8 * (nibble & 7)) & 255;
      if (nibble & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << 8 * k;
    }
    return r;
  });
});

const Opcode sel({"SEL", "FSEL"}, {}, [](Decoder& x) -> Execute {
  const bool is_float = x.instruction().name == "FSEL";
  const Target d = x.target();
  const Source a = is_float ? x.float_source() : x.source(), b = is_float ? x.float_source() : x.source();
  const PredicateSource p = x.predicate();
  return [=](Warp& w, Mask m) {
    Lanes r = a(w);
    const Lanes y = b(w);
    const Mask set = p(w);
    for (int i = 0; i < 32; ++i) r[i] = set >> i & 1 ? r[i] : y[i];
    d.put(w, r, m);
  };
});

// Compares; .EX is the high half of a 64-bit compare, whose low half is the last predicate.
const Opcode isetp(
    {"ISETP"}, {"EQ", "NE", "LT", "LE", "GT", "GE", "U32", "AND", "OR", "XOR", "EX"}, [](Decoder& x) -> Execute {
      const std::string test = x.modifiers().at(0);
      const PredicateTarget p = x.predicate_target(), q = x.predicate_target();
      const Source a = x.source(), b = x.source();
      const PredicateSource c = x.predicate(), low = x.has("EX") ? x.predicate() : PredicateSource{};
      const bool extended = x.has("EX"), is_unsigned = x.has("U32"), either = x.has("OR");
      if (x.has("XOR")) throw Unknown("ISETP.XOR");
      const bool less = test[0] == 'L', more = test[0] == 'G', equal = test == "EQ" || test == "LE" || test == "GE";
      const bool unequal = test == "NE";
      return [=](Warp& w, Mask m) {
        const Lanes u = a(w), v = b(w);
        const Mask other = c(w), below = low(w);
        Mask found = 0;
        for (int i = 0; i < 32; ++i) {
          const int order = u[i] == v[i] ? 0 : (is_unsigned ? u[i] < v[i] : signed32(u[i]) < signed32(v[i])) ? -1 : 1;
          bool yes = (less && order < 0) || (more && order > 0) || (unequal && order != 0);
          if (order == 0) yes = extended ? below >> i & 1 : equal;
          found |= Mask(yes) << i;
        }
        p.put(w, either ? found | other : found & other, m);
        q.put(w, either ? ~found | other : ~found & other, m);
      };
    });

const Opcode popc({"POPC"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  return map1(d, x.source(), [](uint32_t a) { return uint32_t(__builtin_popcount(a)); });
});

const Opcode flo({"FLO"}, {"U32", "SH"}, [](Decoder& x) -> Execute {
  if (!x.has("U32")) throw Unknown("signed FLO");
  const Target d = x.target();
  const bool shift = x.has("SH");
  return map1(d, x.source(), [=](uint32_t a) {
    return a == 0 ? ~0u : shift ? uint32_t(__builtin_clz(a)) : uint32_t(31 - __builtin_clz(a));
  });
});

const Opcode brev({"BREV"}, {}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  return map1(d, x.source(), [](uint32_t a) {
    uint32_t r = 0;
    for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
    return r;
  });
});

}  // namespace
}  // namespace mc

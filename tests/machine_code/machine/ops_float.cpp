// ops_float.cpp - FP32 arithmetic, conversions and tensor cores. Compiled without contraction: one rounding each.
#include <cfenv>
#include <cmath>
#include <cstring>

#include "decode.h"

namespace mc {
namespace {

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// PTX: min and max of one NaN and a number is the number.
uint32_t least(uint32_t a, uint32_t b) { return as_bits(std::fmin(as_float(a), as_float(b))); }
uint32_t most(uint32_t a, uint32_t b) { return as_bits(std::fmax(as_float(a), as_float(b))); }

float rounded_fma(float a, float b, float c, int rounding) {
  const int before = std::fegetround();
  std::fesetround(rounding);
  volatile float p = a, q = b, r = c;
  volatile float result = std::fma(p, q, r);
  std::fesetround(before);
  return result;
}

const Opcode fadd({"FADD"}, {"FTZ"}, [](Decoder& x) -> Execute {
  const bool ftz = x.has("FTZ");
  const Target d = x.target();
  const Source a = x.float_source();
  return map2(d, a, x.float_source(), [=](uint32_t p, uint32_t q) {
    return ftz ? as_bits(flush(flush(as_float(p)) + flush(as_float(q)))) : as_bits(as_float(p) + as_float(q));
  });
});

const Opcode fmul({"FMUL"}, {"FTZ"}, [](Decoder& x) -> Execute {
  const bool ftz = x.has("FTZ");
  const Target d = x.target();
  const Source a = x.float_source();
  return map2(d, a, x.float_source(), [=](uint32_t p, uint32_t q) {
    return ftz ? as_bits(flush(flush(as_float(p)) * flush(as_float(q)))) : as_bits(as_float(p) * as_float(q));
  });
});

const Opcode ffma({"FFMA"}, {"FTZ", "RM", "RP"}, [](Decoder& x) -> Execute {
  const bool ftz = x.has("FTZ"), down = x.has("RM"), up = x.has("RP");
  const Target d = x.target();
  const Source a = x.float_source(), b = x.float_source();
  return map3(d, a, b, x.float_source(), [=](uint32_t p, uint32_t q, uint32_t r) {
    if (down || up) return as_bits(rounded_fma(as_float(p), as_float(q), as_float(r), down ? FE_DOWNWARD : FE_UPWARD));
    const float sum = std::fma(as_float(p), as_float(q), as_float(r));
    return as_bits(ftz ? flush(sum) : sum);
  });
});

const Opcode fmnmx({"FMNMX"}, {"FTZ"}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const Source a = x.float_source(), b = x.float_source();
  const PredicateSource min = x.predicate();
  return [=](Warp& w, Mask m) {
    Lanes r = a(w);
    const Lanes y = b(w);
    const Mask low = min(w);
    for (int i = 0; i < 32; ++i) r[i] = low >> i & 1 ? least(r[i], y[i]) : most(r[i], y[i]);
    d.put(w, r, m);
  };
});

// Compares; the forms with U are true where either is NaN.
const Opcode fsetp({"FSETP"},
                   {"EQ", "NE", "LT", "LE", "GT", "GE", "EQU", "NEU", "LTU", "LEU", "GTU", "GEU", "NUM", "NAN", "FTZ",
                    "AND", "OR"},
                   [](Decoder& x) -> Execute {
                     const std::string test = x.modifiers().at(0);
                     const PredicateTarget p = x.predicate_target(), q = x.predicate_target();
                     const Source a = x.float_source(), b = x.float_source();
                     const PredicateSource c = x.predicate();
                     const bool either = x.has("OR"), ftz = x.has("FTZ"), only_nan = test == "NAN";
                     const bool unordered = only_nan || test.size() == 3, any = test == "NUM";
                     const std::string core = test.substr(0, 2);
                     const bool less = any || core == "LT" || core == "LE" || core == "NE",
                                more = any || core == "GT" || core == "GE" || core == "NE";
                     const bool equal = any || core == "EQ" || core == "LE" || core == "GE";
                     return [=](Warp& w, Mask m) {
                       const Lanes u = a(w), v = b(w);
                       const Mask other = c(w);
                       Mask found = 0;
                       for (int i = 0; i < 32; ++i) {
                         const float l = ftz ? flush(as_float(u[i])) : as_float(u[i]),
                                     r = ftz ? flush(as_float(v[i])) : as_float(v[i]);
                         const bool nan = std::isnan(l) || std::isnan(r);
                         const bool yes = nan ? unordered && !any
                                              : !only_nan && ((less && l < r) || (more && l > r) || (equal && l == r));
                         found |= Mask(yes) << i;
                       }
                       p.put(w, either ? found | other : found & other, m);
                       q.put(w, either ? ~found | other : ~found & other, m);
                     };
                   });

// Computed in double and rounded once; the hardware's tables are off by up to two units in the last place.
const Opcode mufu({"MUFU"}, {"EX2", "RCP", "LG2", "RSQ", "SQRT"}, [](Decoder& x) -> Execute {
  const std::string f = x.modifiers().at(0);
  const Target d = x.target();
  const Source a = x.float_source();
  if (f == "EX2") return map1(d, a, [](uint32_t p) { return as_bits(flush(std::exp2(flush(as_float(p))))); });
  if (f == "RCP") return map1(d, a, [](uint32_t p) { return as_bits(flush(1.0f / flush(as_float(p)))); });
  if (f == "LG2") return map1(d, a, [](uint32_t p) { return as_bits(float(std::log2(double(flush(as_float(p)))))); });
  if (f == "RSQ") return map1(d, a, [](uint32_t p) { return as_bits(float(1.0 / std::sqrt(double(as_float(p))))); });
  return map1(d, a, [](uint32_t p) { return as_bits(std::sqrt(as_float(p))); });
});

const Opcode i2f({"I2F", "I2FP"}, {"RP", "U32", "S32", "U64", "F32"}, [](Decoder& x) -> Execute {
  const bool wide = x.has("U64"), is_unsigned = x.has("U32"), up = x.has("RP");
  const Target d = x.target();
  const Source a = x.source(wide ? 2 : 1);
  return [=](Warp& w, Mask m) {
    const Lanes low = a(w), high = wide ? a(w, 1) : Lanes{};
    Lanes r;
    for (int i = 0; i < 32; ++i) {
      const long double exact = wide          ? static_cast<long double>(uint64_t(high[i]) << 32 | low[i])
                                : is_unsigned ? static_cast<long double>(low[i])
                                              : static_cast<long double>(int32_t(low[i]));
      float value = float(exact);
      if (up && value < exact) value = std::nextafter(value, HUGE_VALF);
      r[i] = as_bits(value);
    }
    d.put(w, r, m);
  };
});

// Saturates; NaN is 0 (.NTZ: and FTZ of the source).
const Opcode f2i({"F2I"}, {"FTZ", "U32", "U64", "S32", "TRUNC", "NTZ", "FLOOR", "CEIL"}, [](Decoder& x) -> Execute {
  const bool wide = x.has("U64"), is_unsigned = wide || x.has("U32");
  const bool floor = x.has("FLOOR"), ceil = x.has("CEIL"), trunc = x.has("TRUNC");
  const Target d = x.target(wide ? 2 : 1);
  const Source a = x.float_source();
  return [=](Warp& w, Mask m) {
    const Lanes v = a(w);
    Lanes low, high;
    for (int i = 0; i < 32; ++i) {
      long double t = as_float(v[i]);
      t = std::isnan(t) ? 0 : floor ? std::floor(t) : ceil ? std::ceil(t) : trunc ? std::trunc(t) : std::nearbyint(t);
      uint64_t value;
      if (is_unsigned) {
        const long double top = wide ? 18446744073709551616.0L : 4294967296.0L;
        value = t < 0 ? 0 : t >= top ? (wide ? ~uint64_t{0} : 0xffffffffu) : uint64_t(t);
      } else {
        value = uint32_t(t < -2147483648.0L ? INT32_MIN : t > 2147483647.0L ? INT32_MAX : int32_t(t));
      }
      low[i] = uint32_t(value), high[i] = uint32_t(value >> 32);
    }
    d.put(w, low, m);
    if (wide) d.put(w, high, m, 1);
  };
});

uint32_t to_bf16(float v) {
  const uint32_t bits = as_bits(v);
  if (std::isnan(v)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
uint32_t to_half(float v) {
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
float from_half(uint32_t bits) {
  const uint16_t low = uint16_t(bits);
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return float(half);
}

float from_bf16(uint32_t bits) { return as_float(bits << 16); }

// float8_e4m3fn: 4 exponent bits of bias 7, 3 mantissa bits, no infinity, NaN in the last code of each sign.
float from_e4m3(uint32_t code) {
  const int exponent = int(code >> 3 & 15), mantissa = int(code & 7);
  if (exponent == 15 && mantissa == 7) return as_float(0x7fffffff);
  const float magnitude =
      exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

// Two floats to a register of two 16-bit values; two e4m3 codes, of the source's low half or (.H1) its high one, to
// FP16.
const Opcode f2fp({"F2FP"}, {"BF16", "F16", "F32", "PACK_AB", "E4M3", "UNPACK_B"}, [](Decoder& x) -> Execute {
  const bool bf16 = x.has("BF16");
  const Target d = x.target();
  if (x.has("E4M3")) {
    if (bf16 || !x.has("UNPACK_B")) throw Unknown("form of F2FP.E4M3");
    const int shift = x.take(".H1") ? 16 : 0;
    return map1(d, x.source(), [=](uint32_t codes) {
      const float low = from_e4m3(codes >> shift & 0xff), high = from_e4m3(codes >> (shift + 8) & 0xff);
      return to_half(high) << 16 | to_half(low);
    });
  }
  const Source a = x.float_source();
  return map2(d, a, x.float_source(), [=](uint32_t high, uint32_t low) {
    return bf16 ? to_bf16(as_float(high)) << 16 | to_bf16(as_float(low))
                : to_half(as_float(high)) << 16 | to_half(as_float(low));
  });
});

// Pairs of 16-bit numbers. A constant stands as two numbers, the high half's first.
Source pair_source(Decoder& x, bool bf16) {
  if (x.next_is_register()) return x.source();
  const float high = std::stof(x.text()), low = std::stof(x.text());
  Source s;
  s.value = bf16 ? to_bf16(high) << 16 | to_bf16(low) : to_half(high) << 16 | to_half(low);
  return s;
}

const Opcode hfma2({"HFMA2"}, {"MMA", "BF16_V2"}, [](Decoder& x) -> Execute {
  const bool bf16 = x.has("BF16_V2");
  const Target d = x.target();
  const bool constant = x.take("-RZ");  // how ptxas writes a constant: -0 * 0 + it
  if (constant) x.text();
  const Source a = constant ? Source{} : pair_source(x, bf16), b = pair_source(x, bf16), c = pair_source(x, bf16);
  if (a.negate || b.negate || c.negate) throw Unknown("signs of HFMA2");
  return map3(d, a, b, c, [=](uint32_t p, uint32_t q, uint32_t r) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const auto half = [&](uint32_t word) {
        const uint32_t bits = word >> shift & 0xffff;
        return double(bf16 ? from_bf16(bits) : from_half(bits));
      };
      const auto sum = float(half(p) * half(q) + half(r));  // products of the kernel's constants are exact
      result |= (std::isnan(sum) ? 0x7fff : bf16 ? to_bf16(sum) : to_half(sum)) << shift;
    }
    return result;
  });
});

// All ones where a half of FP16 is greater than the other, zeros elsewhere.
const Opcode hset2({"HSET2"}, {"GT", "AND"}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const Source a = pair_source(x, false), b = pair_source(x, false);
  if (x.text() != "PT" || a.negate || b.negate) throw Unknown("form of HSET2");
  return map2(d, a, b, [](uint32_t p, uint32_t q) {
    return (from_half(p >> 16) > from_half(q >> 16) ? 0xffff0000u : 0) | (from_half(p) > from_half(q) ? 0xffffu : 0);
  });
});

// FP16 to FP32, as a sum with -0.
const Opcode hadd2({"HADD2"}, {"F32"}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  if (!x.has("F32") || x.text() != "-RZ") throw Unknown("form of HADD2");
  const bool high = x.take(".H1_H1");
  if (!high && !x.take(".H0_H0")) throw Unknown("half of HADD2");
  return map1(d, x.source(), [=](uint32_t p) { return as_bits(from_half(high ? p >> 16 : p)); });
});

// D[16 x 8] = A[16 x 16] B[16 x 8] + C, fragments as in the PTX manual (mma.m16n8k16): lane = 4 * row + column pair.
const Opcode hmma({"HMMA"}, {"16816", "F32", "BF16"}, [](Decoder& x) -> Execute {
  if (!x.has("16816") || !x.has("F32")) throw Unknown("shape of HMMA");
  const bool bf16 = x.has("BF16");
  const Target d = x.target(4);
  const Source a = x.source(4), b = x.source(2), c = x.source(4);
  return [=](Warp& w, Mask m) {
    if (m != kAll) w.fault("HMMA with " + std::to_string(__builtin_popcount(m)) + " lanes");
    const auto element = [&](uint32_t word, int e) {
      const uint32_t bits = e ? word >> 16 : word & 0xffff;
      return bf16 ? as_float(bits << 16) : from_half(bits);
    };
    float A[16][16], B[16][8], D[16][8] = {};
    for (int k = 0; k < 4; ++k) {
      const Lanes r = a(w, k);
      for (int i = 0; i < 32; ++i)
        for (int e = 0; e < 2; ++e) A[i / 4 + 8 * (k & 1)][2 * (i % 4) + e + 8 * (k >> 1)] = element(r[i], e);
    }
    for (int k = 0; k < 2; ++k) {
      const Lanes r = b(w, k);
      for (int i = 0; i < 32; ++i)
        for (int e = 0; e < 2; ++e) B[2 * (i % 4) + e + 8 * k][i / 4] = element(r[i], e);
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) D[row][column] += A[row][k] * B[k][column];
    for (int k = 0; k < 4; ++k) {
      Lanes r = c(w, c.kind == Source::kRegister && c.number != kZero ? k : 0);
      for (int i = 0; i < 32; ++i) r[i] = as_bits(as_float(r[i]) + D[i / 4 + 8 * (k >> 1)][2 * (i % 4) + (k & 1)]);
      d.put(w, r, m, k);
    }
  };
});

// Transposes an 8x8 matrix of 16-bit values held as one register a lane.
const Opcode movm({"MOVM"}, {"16", "MT88"}, [](Decoder& x) -> Execute {
  const Target d = x.target();
  const Source a = x.source();
  return [=](Warp& w, Mask m) {
    const Lanes from = a(w);
    Lanes r{};
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) {
        const uint32_t value = from[row * 4 + column / 2] >> 16 * (column & 1) & 0xffff;
        r[column * 4 + row / 2] |= value << 16 * (row & 1);
      }
    d.put(w, r, m);
  };
});

const Opcode shfl({"SHFL"}, {"UP", "DOWN", "BFLY", "IDX"}, [](Decoder& x) -> Execute {
  const std::string mode = x.modifiers().at(0);
  const PredicateTarget inside = x.predicate_target();
  const Target d = x.target();
  const Source a = x.source(), by = x.source(), bounds = x.source();
  return [=](Warp& w, Mask m) {
    const Lanes from = a(w), shift = by(w), limits = bounds(w);
    Lanes r = from;
    Mask in = 0;
    for (int i = 0; i < 32; ++i) {
      const int clamp = int(limits[i] & 31), segment = int(limits[i] >> 8 & 31), step = int(shift[i] & 31);
      const int low = i & segment, top = low | (clamp & ~segment & 31);
      const int lane = mode == "UP"     ? i - step
                       : mode == "DOWN" ? i + step
                       : mode == "BFLY" ? i ^ step
                                        : low | (step & ~segment & 31);
      const bool ok = mode == "UP" ? lane >= top : lane <= top;
      if (ok && (m >> i & 1) && !(m >> lane & 1))
        w.fault("shuffle from lane " + std::to_string(lane) + ", which does not take part");
      if (ok) r[i] = from[lane], in |= Mask{1} << i;
    }
    inside.put(w, in, m);
    d.put(w, r, m);
  };
});

}  // namespace
}  // namespace mc

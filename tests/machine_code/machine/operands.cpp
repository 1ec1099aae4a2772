// operands.cpp - reads and writes the registers, predicates and addresses of an instruction.
#include <cstring>

#include "decode.h"

namespace mc {

void Target::put(Warp& w, const Lanes& value, Mask m, int word) const {
  if (discarded() || m == 0) return;
  if (uniform) {
    w.UR[size_t(number + word)] = value[first_lane(m)];
    return;
  }
  Lanes& r = w.R[size_t(number + word)];
  if (m == kAll) {
    r = value;
  } else {
    each(m, [&](int i) { r[i] = value[i]; });
  }
}

void PredicateTarget::put(Warp& w, Mask value, Mask m) const {
  if (number == 7 || m == 0) return;
  if (uniform) {
    w.UP[size_t(number)] = value >> first_lane(m) & 1 ? kAll : 0;
  } else {
    w.P[size_t(number)] = (w.P[size_t(number)] & ~m) | (value & m);
  }
}

Mask PredicateSource::operator()(const Warp& w) const {
  const Mask value = number == 7 ? kAll : uniform ? w.UP[size_t(number)] : w.P[size_t(number)];
  return inverted ? ~value : value;
}

uint32_t Source::raw(const Warp& w, int word) const {
  switch (kind) {
    case kUniformRegister:
      return number == 63 ? 0 : w.UR[size_t(number + word)];
    case kConstant:
      return w.block.launch.constant(number, value + 4 * uint32_t(word));
    default:
      return word == 0 ? value : int32_t(value) < 0 && !is_float ? ~0u : 0;
  }
}

Lanes Source::operator()(const Warp& w, int word) const {
  Lanes r;
  if (kind == kRegister) {
    if (number == kZero) {
      std::memset(&r, 0, sizeof r);
    } else {
      r = w.R[size_t(number + word)];
    }
  } else {
    const uint32_t x = raw(w, word);
    for (int i = 0; i < 32; ++i) r[i] = x;
  }
  if (is_float) {
    if (absolute)
      for (int i = 0; i < 32; ++i) r[i] &= 0x7fffffffu;
    if (negate)
      for (int i = 0; i < 32; ++i) r[i] ^= 0x80000000u;
  } else if (negate) {
    for (int i = 0; i < 32; ++i) r[i] = 0u - r[i];
  } else if (invert) {
    for (int i = 0; i < 32; ++i) r[i] = ~r[i];
  }
  return r;
}

void Source::add_to(const Warp& w, uint64_t (&total)[32]) const {
  Source plain = *this;
  plain.negate = false;
  const Lanes x = plain(w);
  for (int i = 0; i < 32; ++i) total[i] += negate ? uint64_t(~x[i]) + 1 : x[i];
}

void Address::operator()(const Warp& w, uint64_t (&at)[32]) const {
  for (int i = 0; i < 32; ++i) at[i] = offset;
  for (size_t k = 0; k < parts.size(); ++k) {
    const Lanes low = parts[k](w);
    for (int i = 0; i < 32; ++i) at[i] += uint64_t(low[i]) * uint64_t(scale[k]);
    if (!wide[k]) continue;
    const Lanes high = parts[k](w, 1);
    for (int i = 0; i < 32; ++i) at[i] += uint64_t(high[i]) << 32;
  }
}

}  // namespace mc

// decode.h - from the text of an instruction to readers and writers of registers. Every operand that is decoded is
// noted in the instruction, so that hazards are checked for exactly what it reads and writes.
#pragma once
#include <initializer_list>
#include <string>
#include <vector>

#include "machine.h"

namespace mc {

// Text that this machine does not know: an error as soon as the instruction is executed.
struct Unknown : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Target {
  int number = kZero;
  bool uniform = false;
  bool discarded() const { return uniform ? number >= 63 : number == kZero; }
  void put(Warp& w, const Lanes& value, Mask m, int word = 0) const;
};

struct PredicateTarget {
  int number = 7;
  bool uniform = false;
  void put(Warp& w, Mask value, Mask m) const;
};

struct PredicateSource {
  int number = 7;
  bool uniform = false, inverted = false;
  Mask operator()(const Warp& w) const;
};

// A register, uniform register, constant or number. Integers: `-` is two's complement, `~` the complement; floats: `-`
// flips the sign, `|x|` clears it.
struct Source {
  enum Kind { kValue, kRegister, kUniformRegister, kConstant };
  Kind kind = kValue;
  uint32_t value = 0;  // or the offset in a bank of constants
  int number = 0;      // of the register or the bank
  bool negate = false, invert = false, absolute = false, is_float = false;
  uint32_t raw(const Warp& w, int word) const;  // uniform kinds
  Lanes operator()(const Warp& w, int word = 0) const;
  void add_to(const Warp& w, uint64_t (&total)[32]) const;  // as a term of a sum with carry: -x is ~x + 1 in 33 bits
};

struct Address {
  std::vector<Source> parts;
  std::vector<bool> wide;
  std::vector<int> scale;
  uint64_t offset = 0;
  void operator()(const Warp& w, uint64_t (&at)[32]) const;
};

class Decoder {
 public:
  Decoder(Instruction& x, std::vector<std::string> modifiers, std::vector<std::string> operands)
      : x_(x), modifiers_(std::move(modifiers)), operands_(std::move(operands)) {}
  Instruction& instruction() { return x_; }
  const std::vector<std::string>& modifiers() const { return modifiers_; }
  bool has(const char* modifier) const;
  bool more() const { return at_ < operands_.size(); }
  bool next_is_predicate() const;
  bool next_is_register() const;
  bool take(const char* suffix);  // off the next operand; whether it had it
  std::string text();
  uint32_t number();
  int bytes() const;  // that a lane loads or stores

  Target target(int words = 1);
  PredicateTarget predicate_target();
  std::vector<PredicateTarget> predicate_targets();  // all that follow
  PredicateSource predicate();
  Source source(int words = 1);
  Source float_source();
  Address address();

 private:
  Source parse(std::string text, bool is_float, int words);
  Instruction& x_;
  std::vector<std::string> modifiers_, operands_;
  size_t at_ = 0;
};

using Builder = Execute (*)(Decoder&);

// One line of the table of instructions: its name, the modifiers that it may carry and what it does.
struct Opcode {
  Opcode(std::initializer_list<const char*> names, std::initializer_list<const char*> modifiers, Builder build);
};

// Decodes "address <tab> high word <tab> stage <tab> text" lines.
Program decode(const std::string& listing, int capability);

template <class F>
inline void each(Mask m, F f) {
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) f(i);
}
inline int first_lane(Mask m) { return m == 0 ? 0 : __builtin_ctz(m); }
inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Executes f on every lane's sources.
template <class F>
Execute map1(Target d, Source a, F f) {
  return [=](Warp& w, Mask m) {
    Lanes r = a(w);
    for (int i = 0; i < 32; ++i) r[i] = f(r[i]);
    d.put(w, r, m);
  };
}
template <class F>
Execute map2(Target d, Source a, Source b, F f) {
  return [=](Warp& w, Mask m) {
    Lanes r = a(w);
    const Lanes y = b(w);
    for (int i = 0; i < 32; ++i) r[i] = f(r[i], y[i]);
    d.put(w, r, m);
  };
}
template <class F>
Execute map3(Target d, Source a, Source b, Source c, F f) {
  return [=](Warp& w, Mask m) {
    Lanes r = a(w);
    const Lanes y = b(w), z = c(w);
    for (int i = 0; i < 32; ++i) r[i] = f(r[i], y[i], z[i]);
    d.put(w, r, m);
  };
}

}  // namespace mc

#include "decode.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>

#include "latencies.h"

namespace mc {
namespace {

struct Entry {
  std::vector<std::string> modifiers;
  Builder build;
};

std::map<std::string, Entry>& table() {
  static std::map<std::string, Entry> entries;
  return entries;
}

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, by);) {
    const size_t a = part.find_first_not_of(' '), b = part.find_last_not_of(' ');
    parts.push_back(a == std::string::npos ? "" : part.substr(a, b - a + 1));
  }
  return parts;
}

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

void erase(std::string& text, const std::string& what) {
  for (size_t at; (at = text.find(what)) != std::string::npos;) text.erase(at, what.size());
}

// "R12", "RZ", "UR4", "URZ", "P3", "PT", "UP0" -> number; throws on anything else.
int register_number(const std::string& text, const char* prefix, int zero) {
  if (!starts(text, prefix)) throw Unknown("not a register: " + text);
  const std::string rest = text.substr(std::strlen(prefix));
  if (rest == "Z" || rest == "T") return zero;
  if (rest.empty() || rest.find_first_not_of("0123456789") != std::string::npos)
    throw Unknown("not a register: " + text);
  return std::stoi(rest);
}

bool is_predicate(const std::string& operand) {
  std::string t = operand;
  if (!t.empty() && t[0] == '!') t = t.substr(1);
  if (starts(t, "U")) t = t.substr(1);
  return t.size() == 2 && t[0] == 'P' && (t[1] == 'T' || (t[1] >= '0' && t[1] <= '7'));
}

}  // namespace

Opcode::Opcode(std::initializer_list<const char*> names, std::initializer_list<const char*> modifiers, Builder build) {
  for (const char* name : names) table()[name] = {{modifiers.begin(), modifiers.end()}, build};
}

// ---- Operands

bool Decoder::has(const char* modifier) const {
  return std::find(modifiers_.begin(), modifiers_.end(), modifier) != modifiers_.end();
}

bool Decoder::next_is_predicate() const { return more() && is_predicate(operands_[at_]); }

bool Decoder::next_is_register() const {
  return more() && !is_predicate(operands_[at_]) && operands_[at_].find_first_of("[") == std::string::npos &&
         operands_[at_].find('R') != std::string::npos;
}

bool Decoder::take(const char* suffix) {
  if (!more() || operands_[at_].find(suffix) == std::string::npos) return false;
  erase(operands_[at_], suffix);
  return true;
}

std::string Decoder::text() {
  if (!more()) throw Unknown("too few operands");
  return operands_[at_++];
}

uint32_t Decoder::number() {
  const std::string t = text();
  size_t used = 0;
  const long long value = std::stoll(t, &used, 0);
  if (used != t.size()) throw Unknown("not a number: " + t);
  return uint32_t(value);
}

int Decoder::bytes() const {
  return has("128") ? 16 : has("64") ? 8 : has("U16") || has("S16") || has("16") ? 2 : has("U8") || has("S8") ? 1 : 4;
}

Target Decoder::target(int words) {
  const std::string t = text();
  Target d;
  d.uniform = starts(t, "U");
  d.number = register_number(t, d.uniform ? "UR" : "R", d.uniform ? 63 : kZero);
  if (!d.discarded() && d.number + words > (d.uniform ? 63 : kZero)) throw Unknown("registers behind " + t);
  for (int k = 0; k < words && !d.discarded(); ++k) {
    x_.destinations.push_back(uint16_t((d.uniform ? kUniform : 0) + d.number + k));
  }
  return d;
}

PredicateTarget Decoder::predicate_target() {
  const std::string t = text();
  PredicateTarget p;
  p.uniform = starts(t, "U");
  p.number = register_number(t, p.uniform ? "UP" : "P", 7);
  if (p.number != 7) x_.destinations.push_back(uint16_t((p.uniform ? kUniformPredicate : kPredicate) + p.number));
  return p;
}

std::vector<PredicateTarget> Decoder::predicate_targets() {
  std::vector<PredicateTarget> found;
  while (next_is_predicate()) found.push_back(predicate_target());
  return found;
}

PredicateSource Decoder::predicate() {
  std::string t = text();
  PredicateSource p;
  p.inverted = starts(t, "!");
  if (p.inverted) t = t.substr(1);
  p.uniform = starts(t, "U");
  p.number = register_number(t, p.uniform ? "UP" : "P", 7);
  if (p.number != 7) x_.sources.push_back(uint16_t((p.uniform ? kUniformPredicate : kPredicate) + p.number));
  return p;
}

Source Decoder::source(int words) { return parse(text(), false, words); }
Source Decoder::float_source() { return parse(text(), true, 1); }

Source Decoder::parse(std::string t, bool is_float, int words) {
  Source s;
  s.is_float = is_float;
  erase(t, ".reuse");
  const size_t digit = t.find_first_not_of("+-");
  if (digit != std::string::npos &&
      (isdigit(t[digit]) || starts(t.substr(digit), "INF") || starts(t.substr(digit), "QNAN"))) {
    if (t.find("0x") != std::string::npos) {
      s.value = uint32_t(std::stoll(t, nullptr, 0));
    } else if (is_float) {
      s.value = as_bits(std::stof(t.find("QNAN") != std::string::npos ? (t[0] == '-' ? "-nan" : "nan") : t));
    } else {
      throw Unknown("number " + t);
    }
    return s;
  }
  for (; !t.empty() && (t[0] == '-' || t[0] == '~'); t = t.substr(1)) (t[0] == '-' ? s.negate : s.invert) = true;
  if (starts(t, "|")) s.absolute = true, erase(t, "|");
  if (starts(t, "c[")) {
    unsigned bank = 0, at = 0;
    if (std::sscanf(t.c_str(), "c[0x%x][0x%x]", &bank, &at) != 2) throw Unknown("constant " + t);
    s.kind = Source::kConstant, s.number = int(bank), s.value = at;
  } else if (starts(t, "UR")) {
    s.kind = Source::kUniformRegister, s.number = register_number(t, "UR", 63);
    if (s.number != 63 && s.number + words > 63) throw Unknown("registers behind " + t);
    for (int k = 0; k < words && s.number != 63; ++k) x_.sources.push_back(uint16_t(kUniform + s.number + k));
  } else {
    s.kind = Source::kRegister, s.number = register_number(t, "R", kZero);
    if (s.number != kZero && s.number + words > kZero) throw Unknown("registers behind " + t);
    for (int k = 0; k < words && s.number != kZero; ++k) x_.sources.push_back(uint16_t(s.number + k));
  }
  return s;
}

Address Decoder::address() {
  std::string t = text();
  if (starts(t, "desc[")) t = t.substr(t.find(']') + 1);
  if (!starts(t, "[") || t.back() != ']') throw Unknown("address " + t);
  Address a;
  for (std::string part : split(t.substr(1, t.size() - 2), '+')) {
    if (starts(part, "0x") || starts(part, "-0x")) {
      a.offset += uint64_t(std::stoll(part, nullptr, 0));
      continue;
    }
    int scale = 1;
    for (const int by : {4, 8, 16}) {
      const std::string suffix = ".X" + std::to_string(by);
      if (part.find(suffix) != std::string::npos) scale = by, erase(part, suffix);
    }
    const bool wide = part.size() > 3 && part.substr(part.size() - 3) == ".64";
    if (wide) part = part.substr(0, part.size() - 3);
    a.parts.push_back(parse(part, false, wide ? 2 : 1));
    a.wide.push_back(wide);
    a.scale.push_back(scale);
  }
  return a;
}

// ---- The program

Program decode(const std::string& listing, int capability) {
  Program program;
  program.capability = capability;
  std::map<std::string, int> counters;
  for (const std::string& line : split(listing, '\n')) {
    const std::vector<std::string> fields = split(line, '\t');
    if (fields.size() != 4) continue;
    Instruction x;
    x.address = uint32_t(std::stoul(fields[0], nullptr, 16));
    const uint64_t high = std::stoull(fields[1], nullptr, 16);
    x.stall = int(high >> 41 & 15), x.writes = int(high >> 46 & 7);
    x.reads = int(high >> 49 & 7), x.waits = int(high >> 52 & 63);
    x.stage = std::stoi(fields[2]);
    x.text = fields[3];
    if (x.address != 16 * program.code.size()) throw Unknown("address " + fields[0] + " out of order");
    std::string body = x.text;
    if (body[0] == '@') {
      const size_t end = body.find(' ');
      std::string guard = body.substr(1, end - 1);
      x.guard_inverted = guard[0] == '!';
      if (x.guard_inverted) guard = guard.substr(1);
      const bool uniform = guard[0] == 'U';
      x.guard = (uniform ? kUniformPredicate : kPredicate) + register_number(guard, uniform ? "UP" : "P", 7);
      body = body.substr(body.find_first_not_of(' ', end));
    }
    const size_t space = body.find(' ');
    std::vector<std::string> parts = split(body.substr(0, space), '.');
    x.name = parts[0];
    parts.erase(parts.begin());
    const std::string counted = x.name == "SYNCS" && !parts.empty() ? x.name + "." + parts[0] : x.name;
    x.counter = counters.emplace(counted, int(counters.size())).first->second;
    const LatencyClass& timing = latency_class(body.substr(0, space));
    x.latency = timing.clocks, x.port = timing.port, x.tensor = x.name == "HMMA";

    auto entry = table().find(x.name);
    if (entry == table().end() && x.name[0] == 'U') entry = table().find(x.name.substr(1));  // the uniform twin
    try {
      if (entry == table().end()) throw Unknown("opcode " + x.name);
      for (const std::string& modifier : parts) {
        const auto& allowed = entry->second.modifiers;
        if (std::find(allowed.begin(), allowed.end(), modifier) == allowed.end()) throw Unknown("modifier " + modifier);
      }
      std::vector<std::string> operands =
          space == std::string::npos ? std::vector<std::string>{} : split(body.substr(space + 1), ',');
      while (!operands.empty() && operands.back().empty()) operands.pop_back();
      Decoder decoder(x, parts, operands);
      x.execute = entry->second.build(decoder);
    } catch (const std::logic_error& error) {  // of std::stoi and its kind
      x.unknown = error.what();
    } catch (const Unknown& error) {
      x.unknown = error.what();
    }
    program.code.push_back(std::move(x));
  }
  program.counters.resize(counters.size());
  for (const auto& [name, index] : counters) program.counters[size_t(index)] = name;
  return program;
}

}  // namespace mc

#include "memory.h"

#include <cstdio>
#include <cstring>

namespace mc {
namespace {

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void Global::add(const std::string& name, void* base, uint64_t bytes, bool writable) {
  const uint64_t start = reinterpret_cast<uint64_t>(base);
  buffers.push_back({name, start, start + bytes, writable, {}});
  if (writable) buffers.back().state.assign(bytes, State::kUnwritten);
  last_ = nullptr;
}

Buffer& Global::find(uint64_t address, int bytes) {
  if (address % uint64_t(bytes) != 0) throw Fault("misaligned global access of " + std::to_string(bytes) + " bytes");
  if (last_ != nullptr && address >= last_->base && address + uint64_t(bytes) <= last_->end) return *last_;
  for (Buffer& b : buffers) {
    if (address >= b.base && address + uint64_t(bytes) <= b.end) {
      last_ = &b;
      return b;
    }
  }
  for (const Buffer& b : buffers) {  // the nearest one names the mistake
    if (address + 4096 >= b.base && address < b.end + 4096) {
      const int64_t at = int64_t(address - b.base);
      throw Fault("outside its buffer: byte " + std::to_string(at) + " of " + b.name + " (" +
                  std::to_string(b.end - b.base) + " bytes)");
    }
  }
  throw Fault("outside every buffer: address " + hex(address));
}

void Global::read(uint64_t address, void* to, int bytes) {
  const Buffer& b = find(address, bytes);
  if (!b.state.empty()) {
    for (int i = 0; i < bytes; ++i) {
      if (b.state[address - b.base + uint64_t(i)] != State::kWritten) {
        throw Fault("unwritten byte " + std::to_string(address - b.base + uint64_t(i)) + " of " + b.name + " read");
      }
    }
  }
  std::memcpy(to, reinterpret_cast<const void*>(address), size_t(bytes));
}

void Global::write(uint64_t address, const void* from, int bytes) {
  Buffer& b = find(address, bytes);
  if (!b.writable) throw Fault("write to " + b.name + ", which the kernel only reads");
  std::memset(&b.state[address - b.base], int(State::kWritten), size_t(bytes));
  std::memcpy(reinterpret_cast<void*>(address), from, size_t(bytes));
}

uint32_t Shared::index(uint32_t offset, int bytes) const {
  if (offset % uint32_t(bytes) != 0) throw Fault("misaligned shared access of " + std::to_string(bytes) + " bytes");
  if (offset < base_ || offset - base_ + uint32_t(bytes) > data_.size()) {
    throw Fault("outside shared memory: byte " + std::to_string(int64_t(offset) - int64_t(base_)) + " of " +
                std::to_string(data_.size()));
  }
  return offset - base_;
}

void Shared::read(uint32_t offset, void* to, int bytes) const {
  const uint32_t at = index(offset, bytes);
  for (int i = 0; i < bytes; ++i) {
    if (state_[at + uint32_t(i)] == State::kWritten) continue;
    const bool flying = state_[at + uint32_t(i)] == State::kInFlight;
    throw Fault((flying ? "read of shared byte " : "unwritten shared byte read: ") + std::to_string(at + uint32_t(i)) +
                (flying ? " before its copy has landed" : ""));
  }
  std::memcpy(to, &data_[at], size_t(bytes));
}

void Shared::write(uint32_t offset, const void* from, int bytes) {
  const uint32_t at = index(offset, bytes);
  for (int i = 0; i < bytes; ++i) {
    if (state_[at + uint32_t(i)] == State::kInFlight) {
      throw Fault("write to shared byte " + std::to_string(at + uint32_t(i)) + " while a copy into it flies");
    }
  }
  std::memset(&state_[at], int(State::kWritten), size_t(bytes));
  std::memcpy(&data_[at], from, size_t(bytes));
}

void Shared::begin_copy(uint32_t offset, int bytes) {
  const uint32_t at = index(offset, bytes);
  for (int i = 0; i < bytes; ++i) {
    if (state_[at + uint32_t(i)] == State::kInFlight) throw Fault("two copies into one shared byte at once");
  }
  std::memset(&state_[at], int(State::kInFlight), size_t(bytes));
}

void Shared::end_copy(uint32_t offset, const void* from, int bytes) {
  const uint32_t at = index(offset, bytes);
  std::memset(&state_[at], int(State::kWritten), size_t(bytes));
  std::memcpy(&data_[at], from, size_t(bytes));
}

}  // namespace mc

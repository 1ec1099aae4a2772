// memory.h - global buffers and shared memory in which every byte knows whether anybody wrote it.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mc {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State : uint8_t { kUnwritten = 0, kWritten = 1, kInFlight = 2 };

struct Buffer {
  std::string name;
  uint64_t base, end;
  bool writable;
  std::vector<State> state;  // of writable buffers: their bytes are unwritten until the kernel writes them
};

// The buffers of one launch at their addresses in this process.
struct Global {
  std::vector<Buffer> buffers;
  void add(const std::string& name, void* base, uint64_t bytes, bool writable);
  void read(uint64_t address, void* to, int bytes);
  void write(uint64_t address, const void* from, int bytes);
  const std::string& name_of(uint64_t address) { return find(address, 1).name; }

 private:
  Buffer& find(uint64_t address, int bytes);
  Buffer* last_ = nullptr;
};

struct Shared {
  Shared(uint32_t base, uint32_t bytes) : base_(base), data_(bytes), state_(bytes, State::kUnwritten) {}
  void read(uint32_t offset, void* to, int bytes) const;
  void write(uint32_t offset, const void* from, int bytes);
  void begin_copy(uint32_t offset, int bytes);  // its bytes may not be touched until end_copy
  void end_copy(uint32_t offset, const void* from, int bytes);

 private:
  uint32_t index(uint32_t offset, int bytes) const;
  uint32_t base_;
  std::vector<uint8_t> data_;
  std::vector<State> state_;
};

}  // namespace mc

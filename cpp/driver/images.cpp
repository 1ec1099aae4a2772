#include "driver/images.h"

#include <cstdint>
#include <cstring>

namespace nsa_sel {
namespace {

// See cmake/pack.py.
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, options;
  uint16_t minor, major;
  uint32_t architecture;
};
constexpr uint16_t kPtx = 1, kElf = 2;

}  // namespace

const unsigned char* find_container(const std::string& kernel) {
  for (int i = 0; i < kNumKernelImages; ++i) {
    if (kernel == kKernelImages[i].kernel) return kKernelImages[i].container;
  }
  return nullptr;
}

Code find_code(const unsigned char* container, int capability) {
  Header header;
  std::memcpy(&header, container, sizeof header);
  const unsigned char* at = container + header.header_bytes;
  const unsigned char* const end = at + header.bytes;
  Code machine_code{nullptr, 0}, ptx{nullptr, 0};
  while (at < end) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    const int architecture = int(entry.architecture);
    const bool elf = entry.kind == kElf && architecture / 10 == capability / 10;
    Code& best = entry.kind == kElf ? machine_code : ptx;
    if ((elf || entry.kind == kPtx) && architecture <= capability && architecture > best.capability) {
      best = {at + entry.header_bytes, architecture};
    }
    at += entry.header_bytes + entry.bytes;
  }
  return machine_code.image != nullptr ? machine_code : ptx;
}

}  // namespace nsa_sel

// tsan_hooks.cpp - answers to the calls that -fsanitize=thread puts at every plain access. Only the kernel's sources
// are compiled with it and libtsan is not linked, so each of their accesses comes here with no change to the source.
#include <link.h>

#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

namespace {

struct Range {
  const char *begin = nullptr, *end = nullptr;
  bool holds(const void* p) const { return p >= begin && p < end; }
};

// The library's own constants and globals: constexpr tables of the kernel, and this emulator's `current_context`.
const Range& library_data() {
  static const Range range = [] {
    Range found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          const char* here = reinterpret_cast<const char*>(&current_context);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
            if (header.p_type != PT_LOAD || here < begin || here >= begin + header.p_memsz) continue;
            Range* range = static_cast<Range*>(out);
            range->end = begin + header.p_memsz;
            range->begin = reinterpret_cast<const char*>(info->dlpi_addr);
            return 1;
          }
          return 0;
        },
        &found);
    return found;
  }();
  return range;
}

void plain(const void* p, int bytes, bool write, const void* pc) {
  Thread* self = engine.self;
  if (!self) return;  // host code of an instrumented source
  const char* at = static_cast<const char*>(p);
  if (at >= self->fiber.stack && at < self->fiber.stack + kStackBytes) return;  // a local variable
  if (at >= reinterpret_cast<const char*>(self) && at < reinterpret_cast<const char*>(self + 1)) return;  // threadIdx
  if (!write) {
    if (library_data().holds(p)) return;
    const LaunchRequest& request = self->block->launch->request;
    const char* params = static_cast<const char*>(request.params.get());
    if (at >= params && at < params + request.params_bytes) return;
  }
  const SiteId site = intern({nullptr, 0, pc});
  current();
  const int step = bytes > 16 ? 16 : bytes;
  for (int i = 0; i < bytes; i += step) {
    // Running on would touch memory that is not the kernel's: the process, not only the result, would be lost.
    if (!plain_access(*self, at + i, step, write, site)) abandon_grid();
  }
}

}  // namespace

}  // namespace nsa_sel::emu

#define NSA_SEL_HOOKS(n)                                                                                    \
  void __tsan_read##n(void* p) { nsa_sel::emu::plain(p, n, false, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { nsa_sel::emu::plain(p, n, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##n(void* p) { nsa_sel::emu::plain(p, n, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { nsa_sel::emu::plain(p, n, true, __builtin_return_address(0)); }

extern "C" {
NSA_SEL_HOOKS(1)
NSA_SEL_HOOKS(2)
NSA_SEL_HOOKS(4)
NSA_SEL_HOOKS(8)
NSA_SEL_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { nsa_sel::emu::plain(p, int(n), false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { nsa_sel::emu::plain(p, int(n), true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Shared pointers of the host's side of a launch; kernels use atomicAdd and its like.
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_sub(volatile int* p, int v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile int* p, int v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_load(const volatile long* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic64_store(volatile long* p, long v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic8_store(volatile char* p, char v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
}

// fibers.cpp - context switches and the scheduler. A thread runs until it has to wait; then another lane of its warp
// runs, then another warp, so that warps drift apart as far as their synchronisation lets them.
#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <set>

#include "internals.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Callee-saved registers and the stack pointer: about 8 ns, where swapcontext makes two system calls.
asm(R"(
.text
.hidden nsa_sel_switch_stack
.globl nsa_sel_switch_stack
.type nsa_sel_switch_stack, @function
nsa_sel_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size nsa_sel_switch_stack, . - nsa_sel_switch_stack
)");
extern "C" void nsa_sel_switch_stack(void** save_sp, void* load_sp);
#else
#include <ucontext.h>
#endif

namespace nsa_sel::emu {

ThreadContext* current_context = nullptr;

namespace {

void find_host_stack() {
  // Once a host thread: for the main thread this reads /proc/self/maps.
  static thread_local char* known_stack = nullptr;
  static thread_local size_t known_bytes = 0;
  if (known_stack) {
    engine.host_fiber.stack = known_stack;
    engine.host_stack_bytes = known_bytes;
    return;
  }
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &engine.host_stack_bytes);
  pthread_attr_destroy(&attributes);
  engine.host_fiber.stack = known_stack = static_cast<char*>(stack);
  known_bytes = engine.host_stack_bytes;
}

void switch_to(Thread* to) {
  Thread* from = engine.self;
  Fiber& save = from ? from->fiber : engine.host_fiber;
  Fiber& load = to ? to->fiber : engine.host_fiber;
  engine.self = to;
  current_context = to ? &to->context : nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that has ended gives its fake stack back; a null slot says so.
  const bool ends = from && from->done;
  __sanitizer_start_switch_fiber(ends ? nullptr : &save.sanitizer_stack, load.stack,
                                 to ? kStackBytes : engine.host_stack_bytes);
#endif
#if defined(__x86_64__)
  nsa_sel_switch_stack(&save.saved_sp, load.saved_sp);
#else
  swapcontext(static_cast<ucontext_t*>(save.machine_context), static_cast<ucontext_t*>(load.machine_context));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(save.sanitizer_stack, nullptr, nullptr);
#endif
}

Thread* pick_lane(Warp& warp) {
  unsigned ready = warp.ready;
  if (engine.settings.schedule == 1) return &warp.block->thread[warp.index * 32 + 31 - __builtin_clz(ready)];
  if (engine.settings.schedule == 2) {
    for (uint64_t skip = next_random() % __builtin_popcount(ready); skip > 0; --skip) ready &= ready - 1;
  }
  return &warp.block->thread[warp.index * 32 + __builtin_ctz(ready)];
}

Warp* pick_warp() {
  const std::vector<uint64_t>& words = engine.cluster.ready_warps;
  const int n = int(words.size());
  if (engine.settings.schedule == 1) {
    for (int i = n - 1; i >= 0; --i) {
      if (words[i]) return engine.cluster.warps[i * 64 + 63 - __builtin_clzll(words[i])];
    }
    return nullptr;
  }
  int total = 0;
  if (engine.settings.schedule == 2) {
    for (uint64_t word : words) total += __builtin_popcountll(word);
  }
  int skip = total > 0 ? int(next_random() % total) : 0;
  for (int i = 0; i < n; ++i) {
    uint64_t word = words[i];
    const int here = __builtin_popcountll(word);
    if (skip >= here) {
      skip -= here;
      continue;
    }
    for (; skip > 0; --skip) word &= word - 1;
    if (word) return engine.cluster.warps[i * 64 + __builtin_ctzll(word)];
  }
  return nullptr;
}

Thread* pick_next() {
  Warp* warp = engine.self ? engine.self->warp : nullptr;
  const bool leave = engine.settings.schedule == 2 && next_random() % 8 == 0;
  if (!warp || !warp->ready || leave) warp = pick_warp();
  return warp ? pick_lane(*warp) : nullptr;
}

void clear_ready(Thread& thread) {
  Warp& warp = *thread.warp;
  warp.ready &= ~(1u << thread.lane);
  if (!warp.ready) engine.cluster.ready_warps[warp.order >> 6] &= ~(1ull << (warp.order & 63));
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  const LaunchRequest& request = engine.self->block->launch->request;
  request.invoke(request.kernel, request.params.get());
  Thread& self = *engine.self;
  self.done = true;
  --engine.cluster.live;
  --self.block->live;
  self.warp->live &= ~(1u << self.lane);
  clear_ready(self);
  thread_exits(self);
  switch_to(pick_next());
  abort();  // nobody wakes a thread that has ended
}

}  // namespace

uint64_t next_random() {
  uint64_t& x = engine.settings.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

Thread& current() {
  Thread& self = *engine.self;
  if (++engine.steps > engine.settings.step_limit) {
    finding_with_key("step-limit", "", 0, "the grid made %lu calls without an end; raise the limit if it is only large",
                     (unsigned long)engine.settings.step_limit);
    abandon_grid();
  }
  return self;
}

void prepare_fiber(Thread& thread) {
  Fiber& fiber = thread.fiber;
  if (!fiber.stack) {
    // A page without access below the stack: a runaway local array faults instead of reaching the next fiber.
    constexpr size_t kGuard = 4096;
    void* memory =
        mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    mprotect(memory, kGuard, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + kGuard;
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);
  fiber.sanitizer_stack = nullptr;
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 16);
  *--top = nullptr;  // keeps the alignment that a call would leave
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.saved_sp = top;
#else
  if (!fiber.machine_context) fiber.machine_context = new ucontext_t;
  if (!engine.host_fiber.machine_context) engine.host_fiber.machine_context = new ucontext_t;
  ucontext_t* context = static_cast<ucontext_t*>(fiber.machine_context);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, fiber_main, 0);
#endif
}

void run_fibers() {
  find_host_stack();  // the caller may be another host thread than last time
  engine.self = nullptr;
  while (!engine.abandoned) {
    Thread* next = pick_next();
    if (!next) return;
    switch_to(next);
  }
}

void set_ready(Thread& thread) {
  Warp& warp = *thread.warp;
  warp.ready |= 1u << thread.lane;
  engine.cluster.ready_warps[warp.order >> 6] |= 1ull << (warp.order & 63);
}

void suspend_current() {
  Thread* self = engine.self;
  Thread* next = pick_next();
  if (next != self) switch_to(next);
}

void block_current(const char* what, SiteId site) {
  Thread& self = *engine.self;
  self.waits_for = what;
  self.waits_at = site;
  clear_ready(self);
  suspend_current();
}

void maybe_yield() {
  if (engine.settings.schedule != 2 || next_random() % 4 != 0) return;
  random_async_progress();
  Warp* warp = pick_warp();
  if (!warp) return;
  Thread* next = pick_lane(*warp);
  if (next != engine.self) switch_to(next);
}

void abandon_grid() {
  engine.abandoned = true;
  switch_to(nullptr);
  abort();
}

void describe_waits(std::string& text) {
  std::map<std::string, int> threads;
  std::map<std::string, std::set<std::string>> warps;
  for (unsigned b = 0; b < engine.cluster.size; ++b) {
    Block& block = *engine.cluster.blocks[b];
    for (int t = 0; t < block.threads; ++t) {
      const Thread& thread = block.thread[t];
      if (thread.done) continue;
      const std::string place = std::string(thread.waits_for) + " at " + location(thread.waits_at);
      ++threads[place];
      warps[place].insert((engine.cluster.size > 1 ? std::to_string(block.id) + "." : "") + std::to_string(t >> 5));
    }
  }
  for (auto& [place, count] : threads) {
    text += "; " + std::to_string(count) + " threads (warp";
    for (const std::string& warp : warps[place]) text += " " + warp;
    text += ") in " + place;
  }
}

}  // namespace nsa_sel::emu

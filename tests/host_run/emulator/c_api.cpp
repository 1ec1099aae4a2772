// c_api.cpp - the emulator as C functions, for ctypes. Texts live until the next call that returns one.
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {
void begin_stream(int stream);
void run_streams(uint64_t seed);
}  // namespace nsa_sel::emu

using namespace nsa_sel::emu;

#define EMU_API extern "C" __attribute__((visibility("default")))

EMU_API void emu_register(const char* name, void* base, size_t bytes, int writable, int tracked, int dependent) {
  Buffer buffer{
      name, static_cast<char*>(base), bytes, writable != 0, tracked != 0 || dependent != 0, dependent != 0, {}, {}, {},
      {}};
  for (Buffer& b : engine.buffers) {
    if (b.name != name) continue;
    b = std::move(buffer);
    reset_buffer(b);
    return;
  }
  engine.buffers.push_back(std::move(buffer));
  reset_buffer(engine.buffers.back());
}
EMU_API void emu_unregister_all() { engine.buffers.clear(); }

// Forgets findings, counters, traces, drops, recorded launches and what is known of the registered buffers' contents.
EMU_API void emu_reset(int schedule, int check, uint64_t seed, int trace) {
  const Settings before = engine.settings;
  engine.settings = Settings();
  engine.settings.schedule = schedule;
  engine.settings.check = check != 0;
  engine.settings.trace = trace != 0;
  engine.settings.random = seed * 0x9e3779b97f4a7c15ull | 1;
  engine.settings.step_limit = before.step_limit;
  engine.settings.blocks_per_sm = before.blocks_per_sm;
  engine.findings.clear();
  engine.finding_keys.clear();
  memset(engine.counters, 0, sizeof engine.counters);
  engine.site_counters.clear();
  engine.sync_sites.clear();
  engine.trace.clear();
  engine.drops.clear();
  engine.publications.clear();
  engine.launches.clear();
  engine.last_in_stream.clear();
  engine.recorded.clear();
  engine.recording = false;
  engine.steps = 0;
  for (Buffer& b : engine.buffers) reset_buffer(b);
}

EMU_API void emu_set_step_limit(uint64_t steps) { engine.settings.step_limit = steps; }

// Leaves one synchronisation out from now on; 0: no such kind.
EMU_API int emu_drop(const char* kind, const char* file, int line) {
  for (int op = 0; op < kNumOps; ++op) {
    if (strcmp(kOpNames[op], kind) != 0) continue;
    engine.drops.push_back({Op(op), file, line});
    return 1;
  }
  return 0;
}

EMU_API int emu_finding_count() { return int(engine.findings.size()); }
EMU_API const char* emu_finding(int i) { return engine.findings[i].c_str(); }
EMU_API const char* emu_counters() {
  return dump_counters();
}  // op, requests, bytes, sectors, wavefronts, conflicts, lanes
EMU_API const char* emu_sites() { return dump_sites(false); }      // op, place, then as above
EMU_API const char* emu_sync_sites() { return dump_sites(true); }  // op, place, executions by thread
EMU_API const char* emu_buffers() { return dump_buffers(); }
EMU_API const char* emu_trace() { return dump_trace(); }
EMU_API uint64_t emu_steps() { return engine.steps; }

EMU_API void emu_begin_stream(int stream) { begin_stream(stream); }
EMU_API void emu_run_streams(uint64_t seed) { run_streams(seed); }

// What a driver knows of a launch and no more. Returns a cudaError_t; cudaErrorInvalidDeviceFunction for a wrong name.
EMU_API int emu_launch(const char* name, unsigned grid, unsigned block, unsigned smem_bytes, unsigned cluster,
                       int programmatic, const void* params) {
  constexpr int kInvalidDeviceFunction = 98;
  const KernelEntry* kernel = find_kernel(name);
  if (kernel == nullptr) return kInvalidDeviceFunction;
  return launch(*kernel, params, grid, block, smem_bytes, cluster, programmatic != 0);
}
EMU_API size_t emu_params_bytes(const char* name) {  // 0: no such kernel
  const KernelEntry* kernel = find_kernel(name);
  return kernel == nullptr ? 0 : kernel->params_bytes;
}

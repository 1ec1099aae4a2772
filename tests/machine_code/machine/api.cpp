// api.cpp - the C interface through which Python loads programs, names memory and launches grids.
#include <cstring>
#include <sstream>

#include "decode.h"

namespace {

std::string result;

const char* failed(const std::exception& error) {
  result = std::string("fault\t") + error.what() + '\n';
  return result.c_str();
}

}  // namespace

extern "C" {

struct LaunchRequest {
  const void* parameters;
  int64_t parameter_bytes, grid, cluster, warps, shared_bytes, stages, limit, clusters;
};

mc::Program* machine_program(const char* listing, int capability) {
  return new mc::Program(mc::decode(listing, capability));
}
void machine_free_program(mc::Program* program) { delete program; }

void machine_bank(mc::Program* program, int bank, const uint8_t* bytes, int64_t size) {
  program->banks[bank].assign(bytes, bytes + size);
}

// "address <tab> text <tab> why" of every instruction that is unknown, as lines.
const char* machine_unknown(const mc::Program* program) {
  std::ostringstream out;
  for (const mc::Instruction& x : program->code) {
    if (!x.execute) out << std::hex << x.address << '\t' << x.text << '\t' << x.unknown << '\n';
  }
  result = out.str();
  return result.c_str();
}

mc::Global* machine_memory() { return new mc::Global; }
void machine_free_memory(mc::Global* memory) { delete memory; }
void machine_add(mc::Global* memory, const char* name, void* base, uint64_t bytes, int writable) {
  memory->add(name, base, bytes, writable != 0);
}

// Returns lines "kind <tab> name <tab> numbers ...", or "fault <tab> what".
const char* machine_launch(const mc::Program* program, mc::Global* memory, const mc::Model* model,
                           const LaunchRequest* request) {
  try {
    mc::Launch launch(*program, *memory, *model);
    launch.cluster_size = int(request->cluster);
    const auto* bytes = static_cast<const uint8_t*>(request->parameters);
    launch.parameters.assign(bytes, bytes + request->parameter_bytes);
    launch.stages.resize(size_t(request->stages));
    launch.limit = request->limit;
    std::ostringstream out;
    try {
      launch.run(int(request->grid), int(request->warps), uint32_t(request->shared_bytes), int(request->clusters));
    } catch (const mc::Fault& fault) {
      out << "fault\t" << fault.what() << '\n';
    }
    out << "end\t\t" << launch.end << '\n' << "instructions\t\t" << launch.instructions << '\n';
    out << "copied\t\t" << launch.copied << '\n' << "barriers\t\t" << launch.barriers << '\n';
    out << "visited\t\t";
    for (const bool ran : launch.visited) out << ran;
    out << '\n';
    for (size_t i = 0; i < program->counters.size(); ++i)
      out << "count\t" << program->counters[i] << '\t' << launch.counts[i] << '\n';
    for (const auto& [name, time] : launch.marks) out << "mark\t" << name << '\t' << time << '\n';
    for (size_t i = 0; i < launch.stages.size(); ++i) {
      const mc::StageClocks& s = launch.stages[i];
      out << "stage\t" << i << '\t' << s.busy << '\t' << s.stalled << '\t' << s.slept << '\t' << s.issued << '\t'
          << s.entered << '\n';
    }
    result = out.str();
    return result.c_str();
  } catch (const std::exception& error) {
    return failed(error);
  }
}

}  // extern "C"

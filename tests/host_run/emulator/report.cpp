// report.cpp - places in the source, findings, and the tables that tests read.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "internals.h"

namespace nsa_sel::emu {

Engine engine;

namespace {

struct SiteTable {
  std::vector<Site> sites{Site{"?", 0, nullptr}};
  std::unordered_map<uint64_t, SiteId> ids;
  std::vector<std::string> locations{"?:0"};
  struct Recent {
    Site site{nullptr, 0, nullptr};
    SiteId id = 0;
  } recent[256];
};
SiteTable table;

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// Lines that inlining puts between a kernel's line and its machine code, and that say nothing about the kernel.
bool is_plumbing(const std::string& path) {
  for (const char* name :
       {"host_primitives.h", "host_runtime.h", "cuda_fp16", "cuda_bf16", "vector_types.h", "/c++/"}) {
    if (path.find(name) != std::string::npos) return true;
  }
  return path.rfind("??", 0) == 0;
}

// Reads addr2line's frames of one address, innermost first: those up to the next line that starts with "0x".
std::string pick_frame(const std::vector<std::string>& frames) {
  const std::string* best = nullptr;
  for (const std::string& frame : frames) {
    if (!best) best = &frame;
    if (!is_plumbing(frame)) {
      best = &frame;
      break;
    }
  }
  return best ? base_name(best->substr(0, best->find(' ')).c_str()) : "?:0";
}

struct Dumper {
  std::string text;
  void line(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    text += buffer;
    text += '\n';
  }
};

}  // namespace

SiteId intern(const Site& site) {
  const uint64_t hash = (reinterpret_cast<uintptr_t>(site.pc ? site.pc : site.file) * 0x9e3779b97f4a7c15ull) ^
                        (uint64_t(site.line) * 0xff51afd7ed558ccdull);
  SiteTable::Recent& recent = table.recent[hash >> 56];
  if (recent.site.file == site.file && recent.site.line == site.line && recent.site.pc == site.pc) return recent.id;
  auto [at, added] = table.ids.try_emplace(hash, SiteId(table.sites.size()));
  if (added) {
    table.sites.push_back(site);
    table.locations.emplace_back();
  }
  recent = {site, at->second};
  return at->second;
}

const Site& site_of(SiteId id) { return table.sites[id]; }

void locate_all(const std::vector<SiteId>& ids) {
  // One process for all addresses: the debug information of a kernel takes it longer to read than to search.
  std::map<std::string, std::vector<std::pair<SiteId, uintptr_t>>> by_library;
  for (SiteId id : ids) {
    const Site& site = table.sites[id];
    if (!table.locations[id].empty()) continue;
    Dl_info info;
    if (site.pc == nullptr) {
      table.locations[id] = std::string(base_name(site.file)) + ":" + std::to_string(site.line);
    } else if (dladdr(site.pc, &info) && info.dli_fname) {
      const uintptr_t address = static_cast<const char*>(site.pc) - static_cast<const char*>(info.dli_fbase) - 1;
      by_library[info.dli_fname].push_back({id, address});
    }
  }
  for (auto& [library, wanted] : by_library) {
    for (size_t begin = 0; begin < wanted.size(); begin += 256) {
      const size_t end = std::min(begin + 256, wanted.size());
      std::string command = "addr2line -a -i -e '" + library + "'";
      char hex[32];
      for (size_t i = begin; i < end; ++i) {
        snprintf(hex, sizeof hex, " %#zx", size_t(wanted[i].second));
        command += hex;
      }
      FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
      if (!pipe) continue;
      std::vector<std::string> frames;
      size_t at = begin;
      bool started = false;
      char buffer[1024];
      const auto finish = [&] {
        if (started && at < end) table.locations[wanted[at++].first] = pick_frame(frames);
        frames.clear();
      };
      while (fgets(buffer, sizeof buffer, pipe)) {
        buffer[strcspn(buffer, "\n")] = 0;
        if (strncmp(buffer, "0x", 2) == 0) {
          finish();
          started = true;
        } else {
          frames.push_back(buffer);
        }
      }
      finish();
      pclose(pipe);
    }
  }
  for (SiteId id : ids) {
    if (table.locations[id].empty()) table.locations[id] = "?:0";
  }
}

std::string location(SiteId id) {
  if (table.locations[id].empty()) locate_all({id});
  return table.locations[id];
}

static void add_finding(const char* kind, const std::string& key, SiteId site, const char* format, va_list arguments) {
  constexpr size_t kMaxFindings = 200;  // the first few tell the story
  if (engine.findings.size() >= kMaxFindings) return;
  if (!engine.finding_keys.insert(std::string(kind) + "|" + key).second) return;
  char message[1024];
  vsnprintf(message, sizeof message, format, arguments);
  engine.findings.push_back(std::string(kind) + ": " + location(site) + ": " + message);
}

void finding(const char* kind, SiteId site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add_finding(kind, std::to_string(site), site, format, arguments);
  va_end(arguments);
}

void finding_with_key(const char* kind, const std::string& key, SiteId site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add_finding(kind, key, site, format, arguments);
  va_end(arguments);
}

bool sync_dropped(Op op, SiteId site) {
  ++engine.sync_sites[uint64_t(site) << 8 | op];
  if (engine.drops.empty()) return false;
  const Site& place = site_of(site);
  for (const Drop& drop : engine.drops) {
    if (drop.op == op && drop.line == place.line && place.file && drop.file == base_name(place.file)) return true;
  }
  return false;
}

// ---- Tables: tab-separated lines, sorted by place, so that the text is the same in every run
// --------------------------

static std::string dumped;

const char* dump_sites(bool sync) {
  std::vector<SiteId> ids;
  for (auto& entry : engine.site_counters) ids.push_back(SiteId(entry.first >> 8));
  if (!sync) locate_all(ids);
  std::map<std::pair<std::string, int>, OpCounters> merged;
  if (sync) {
    for (auto& [key, executions] : engine.sync_sites) {
      merged[{location(SiteId(key >> 8)), int(key & 0xff)}].requests += executions;
    }
  } else {
    for (auto& [key, c] : engine.site_counters) merged[{location(SiteId(key >> 8)), int(key & 0xff)}] += c;
  }
  Dumper out;
  for (auto& [key, c] : merged) {
    out.line("%s\t%s\t%lu\t%lu\t%lu\t%lu\t%lu\t%lu", kOpNames[key.second], key.first.c_str(), c.requests, c.bytes,
             c.sectors, c.wavefronts, c.conflicts, c.lanes);
  }
  dumped = std::move(out.text);
  return dumped.c_str();
}

const char* dump_counters() {
  Dumper out;
  for (int op = 0; op < kNumOps; ++op) {
    const OpCounters& c = engine.counters[op];
    out.line("%s\t%lu\t%lu\t%lu\t%lu\t%lu\t%lu", kOpNames[op], c.requests, c.bytes, c.sectors, c.wavefronts,
             c.conflicts, c.lanes);
  }
  dumped = std::move(out.text);
  return dumped.c_str();
}

const char* dump_buffers() {
  Dumper out;
  for (const Buffer& b : engine.buffers) {
    const BufferCounters& c = b.counters;
    std::string widths;
    for (auto& [bytes, lanes] : b.read_widths) {
      widths += (widths.empty() ? "" : ",") + std::to_string(bytes) + ":" + std::to_string(lanes);
    }
    out.line("%s\t%lu\t%lu\t%lu\t%lu\t%lu\t%lu\t%s", b.name.c_str(), c.bytes_read, c.sectors_read, c.bytes_written,
             c.sectors_written, c.distinct_sectors_read, c.distinct_sectors_written, widths.c_str());
  }
  dumped = std::move(out.text);
  return dumped.c_str();
}

const char* dump_trace() {
  Dumper out;
  for (const TraceEvent& e : engine.trace) {
    out.line("%u\t%d\t%s\t%s\t%s\t%lu", e.block, e.warp, kOpNames[e.op], location(e.site).c_str(),
             e.buffer < 0 ? "" : engine.buffers[e.buffer].name.c_str(), e.offset);
  }
  dumped = std::move(out.text);
  return dumped.c_str();
}

}  // namespace nsa_sel::emu

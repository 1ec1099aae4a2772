// engine.h - launches, registered buffers, what was found and counted: the whole state of the emulator.
#pragma once
#include <map>
#include <unordered_set>

#include "emulator.h"

namespace nsa_sel::emu {

struct Launch {
  uint32_t id = 0;       // 1-based; 0 in a cell: nobody
  uint32_t session = 0;  // launches of different sessions have the host between them
  int stream = 0;
  const Launch* previous = nullptr;  // in the stream
  LaunchRequest request;
  bool waited = false;  // some thread executed griddepcontrol.wait
  unsigned clusters = 0, next_cluster = 0;
};

struct GlobalCell {  // two bytes of a tracked buffer
  uint32_t write_launch, write_block, write_clock;
  uint32_t read_launch, read_block, read_clock;
  uint16_t write_thread, read_thread;
  SiteId write_site, read_site;
};

struct BufferCounters {
  uint64_t bytes_read, sectors_read, bytes_written, sectors_written, distinct_sectors_read, distinct_sectors_written;
};

struct Buffer {
  std::string name;
  char* base;
  size_t bytes;
  bool writable, tracked, dependent;  // dependent: the previous grid of the stream wrote it
  BufferCounters counters;
  std::map<int, uint64_t> read_widths;  // bytes per lane -> lanes
  std::vector<uint8_t> touched;         // per sector: 1 read, 2 written
  std::vector<GlobalCell> cells;
};

// What a block made visible to whoever synchronises through `address`.
struct Publication {
  uint32_t launch, block;
  uint64_t sequence;
  VectorClock fenced, known;
  std::vector<uint32_t> fence_clocks;  // of every thread of the block
};

struct OpCounters {
  uint64_t requests, bytes, sectors, wavefronts, conflicts, lanes;

  void operator+=(const OpCounters& other) {
    requests += other.requests;
    bytes += other.bytes;
    sectors += other.sectors;
    wavefronts += other.wavefronts;
    conflicts += other.conflicts;
    lanes += other.lanes;
  }
};

struct TraceEvent {
  unsigned block;
  int warp;
  Op op;
  SiteId site;
  int buffer;  // -1: none
  uint64_t offset;
};

struct Drop {
  Op op;
  std::string file;
  int line;
};

struct Settings {
  int schedule = 0;  // 0 ascending, copies land late; 1 descending, copies land early; 2 random
  bool check = true, trace = false;
  uint64_t random = 1;
  uint64_t step_limit = 200u << 20;
  int blocks_per_sm = 2;
};

struct Engine {
  Settings settings;
  std::vector<Drop> drops;

  // Findings and counters since the last reset.
  std::vector<std::string> findings;
  std::unordered_set<std::string> finding_keys;
  OpCounters counters[kNumOps];
  std::unordered_map<uint64_t, OpCounters> site_counters;  // by site << 8 | op
  std::unordered_map<uint64_t, uint64_t> sync_sites;       // executions, by site << 8 | op
  std::vector<TraceEvent> trace;
  std::vector<Buffer> buffers;
  std::map<const void*, std::vector<Publication>> publications;
  uint64_t atomic_sequence = 0;
  uint64_t steps = 0;

  // The grid that runs.
  std::deque<Launch> launches;
  uint32_t session = 1;
  bool recording = false;
  int record_stream = 0;
  std::map<int, std::vector<LaunchRequest>> recorded;
  std::map<int, const Launch*> last_in_stream;
  Cluster cluster;
  Launch* launch = nullptr;
  Thread* self = nullptr;  // null: the host's own stack
  Fiber host_fiber;
  size_t host_stack_bytes = 0;
  bool abandoned = false;
};
extern Engine engine;

}  // namespace nsa_sel::emu

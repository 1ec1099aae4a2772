// internals.h - what the parts of the emulator offer each other, by the file that defines it.
#pragma once
#include <cstdarg>

#include "engine.h"

namespace nsa_sel::emu {

// ---- report.cpp -----------------------------------------------------------------------------------------------------
SiteId intern(const Site& site);
const Site& site_of(SiteId id);
std::string location(SiteId id);                  // "file.cuh:12"
void locate_all(const std::vector<SiteId>& ids);  // one addr2line for many instrumented accesses
void finding(const char* kind, SiteId site, const char* format, ...) __attribute__((format(printf, 3, 4)));
void finding_with_key(const char* kind, const std::string& key, SiteId site, const char* format, ...)
    __attribute__((format(printf, 4, 5)));
// Counts a synchronisation and tells whether the caller asked for this one to be left out.
bool sync_dropped(Op op, SiteId site);
const char* dump_sites(bool sync);
const char* dump_counters();
const char* dump_buffers();
const char* dump_trace();

// ---- fibers.cpp -----------------------------------------------------------------------------------------------------
void prepare_fiber(Thread& thread);
void run_fibers();  // until none is ready or the grid is abandoned
void set_ready(Thread& thread);
void block_current(const char* what, SiteId site);  // the fiber sleeps until set_ready
void suspend_current();                             // as above, `ready` was already cleared
void maybe_yield();                                 // schedule 2: sometimes another warp goes first
[[noreturn]] void abandon_grid();                   // from a fiber: nobody runs on
uint64_t next_random();
Thread& current();  // counts a step; endless kernels end here
void describe_waits(std::string& text);

// ---- counters.cpp ---------------------------------------------------------------------------------------------------
void note(Thread& thread, Op op, SiteId site, uint64_t address, int bytes);
void count(Op op, SiteId site, const OpCounters& amount);
void flush_requests(Warp& warp);  // all lanes have converged
void count_bulk(uint64_t address, uint32_t bytes, SiteId site);
void note_event(const Thread& thread, Op op, SiteId site, int buffer = -1, uint64_t offset = 0);

// ---- regions.cpp, shared_memory.cpp
// ----------------------------------------------------------------------------------------------
struct SharedPlace {
  Block* block = nullptr;
  const Region* region = nullptr;
  uint32_t offset = 0;  // as on the device
};
bool in_shared_arena(const void* p);
SharedPlace find_shared(const void* p, int bytes, bool write, SiteId site);  // block null: out of bounds, reported
bool shared_read(Thread& thread, const void* p, int bytes, SiteId site, SharedPlace* place = nullptr);
bool shared_write(Thread& thread, const void* p, int bytes, SiteId site, SharedPlace* place = nullptr);
// The destination of an asynchronous copy: written by `column` at `clock`, on behalf of `thread`.
bool shared_async_write(Thread& thread, const void* p, int bytes, int column, uint32_t clock, bool bulk, SiteId site,
                        SharedPlace* place);
const char* region_name(const SharedPlace& place);
void reset_shared(Block& block, size_t smem_bytes);
void reset_arenas(unsigned blocks, size_t smem_bytes);
void release_arenas();

// ---- global_memory.cpp ----------------------------------------------------------------------------------------------
constexpr uint32_t kDependentLaunch = ~0u;  // in place of a writer: the grid before the first launch
uint64_t global_read(Thread& thread, const void* p, int bytes, SiteId site);  // kNoAddress: refused, reported
uint64_t global_write(Thread& thread, const void* p, int bytes, SiteId site);
uint64_t global_atomic(Thread& thread, const void* p, int bytes, SiteId site);
void reset_buffer(Buffer& buffer);

// ---- mbarrier.cpp ---------------------------------------------------------------------------------------------------
// The barrier at `p` for an operation of `thread`; null: there is none, reported.
Mbarrier* find_mbarrier(Thread& thread, const uint64_t* p, SiteId site, uint32_t* offset = nullptr);
void release_phase_if_complete(Mbarrier& barrier);
void arrive_now(Thread& thread, Mbarrier& barrier, SiteId site);
void cp_async_arrives(Mbarrier& barrier, const Thread& thread, uint32_t batch, SiteId site);

// ---- async_copies.cpp -----------------------------------------------------------------------------------------------
bool make_async_progress();  // nothing else can run: one arrival or one barrier's bulk copies happen; false: none left
void random_async_progress();
void report_lost_copies(Block& block);

// ---- barriers.cpp ---------------------------------------------------------------------------------------------------
void thread_exits(Thread& thread);
void check_remote_accesses();  // at the end of a cluster

// ---- accesses.cpp, for instrumented accesses -------------------------------------------------------------------
bool plain_access(Thread& thread, const void* p, int bytes, bool write, SiteId site);

}  // namespace nsa_sel::emu

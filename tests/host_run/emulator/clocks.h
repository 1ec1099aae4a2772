// clocks.h - vector clocks: what each thread of a block knows of the others. One row a thread; one column a thread,
// plus one for each agent that writes on a thread's behalf (its cp.async, the bulk copies of an mbarrier), plus two
// counters that travel with the same joins: the cluster barrier and the dependency on the previous grid.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace nsa_sel::emu {

using VectorClock = std::vector<uint32_t>;

class Clocks {
 public:
  static constexpr int kGridDependency = 0;  // 1: ordered after griddepcontrol.wait
  static constexpr int kClusterBarrier = 1;  // completed cluster barriers that this thread is ordered after
  static constexpr int kFirstThread = 2;

  void reset(int threads) {
    const int stride = kFirstThread + 2 * threads + kMaxBarrierColumns;
    if (stride != stride_ || rows_.size() != size_t(stride) * threads) {
      stride_ = stride;
      rows_.assign(size_t(stride) * threads, 0);
    } else {
      for (int t = 0; t < threads; ++t) std::fill_n(row(t), width_, 0u);
    }
    threads_ = threads;
    width_ = kFirstThread + threads;
    for (int t = 0; t < threads; ++t) row(t)[column_of(t)] = 1;
  }

  static int column_of(int thread) { return kFirstThread + thread; }
  bool is_thread(int column) const { return column < kFirstThread + threads_; }
  int width() const { return width_; }
  // A column for an asynchronous agent, or -1: more agents than a block of this size can have.
  int add_column() { return width_ < stride_ ? width_++ : -1; }

  uint32_t* row(int thread) { return &rows_[size_t(thread) * stride_]; }
  const uint32_t* row(int thread) const { return &rows_[size_t(thread) * stride_]; }
  uint32_t now(int thread) const { return row(thread)[column_of(thread)]; }
  void tick(int thread) { ++row(thread)[column_of(thread)]; }
  bool knows(int thread, int column, uint32_t clock) const { return clock <= row(thread)[column]; }

  // Publishes all that `thread` did and knows into `into`; what it does next is not part of it.
  void release(int thread, VectorClock& into) {
    join(into, row(thread));
    tick(thread);
  }
  void acquire(int thread, const VectorClock& from) {
    uint32_t* mine = row(thread);
    const int n = std::min(int(from.size()), width_);
    const uint32_t* other = from.data();
    for (int i = 0; i < n; ++i) mine[i] = std::max(mine[i], other[i]);
  }
  // A barrier among threads: afterwards each knows what any of them knew.
  template <class Threads>
  void synchronise(const Threads& threads) {
    scratch_.assign(width_, 0);
    for (int t : threads) join(scratch_, row(t));
    for (int t : threads) {
      std::copy_n(scratch_.data(), width_, row(t));
      tick(t);
    }
  }

 private:
  static constexpr int kMaxBarrierColumns = 64;

  void join(VectorClock& into, const uint32_t* from) {
    if (int(into.size()) < width_) into.resize(width_, 0);
    uint32_t* out = into.data();
    for (int i = 0; i < width_; ++i) out[i] = std::max(out[i], from[i]);
  }

  int threads_ = 0, stride_ = 0, width_ = 0;
  std::vector<uint32_t> rows_;
  VectorClock scratch_;
};

}  // namespace nsa_sel::emu

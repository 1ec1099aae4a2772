#include "plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace nsa_sel {
namespace {

constexpr int kReservedPerBlock = 1024;     // shared memory that the driver takes from every block
constexpr int64_t kAssumedSelected = 4096;  // when the caller gave no bound: steers the splits, never the result
constexpr int kInvariantSplits = 8;         // batch_invariant: the same cut of every row, whatever the batch
constexpr int kInvariantTokens = 128;
constexpr int kMaxClusterSize = 8;  // portable limit

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Residency {
  int blocks, slots;
};

// Two blocks per SM hide each other's softmax; one block is for launches that cannot fill the SMs twice (its ring then
// holds a split's whole K and V) and for instances whose ring would otherwise starve.
Residency choose_residency(const TileShape& tile, int h, const DeviceLimits& device, bool few_items) {
  const int needed = bytes_in_flight_needed(device.capability);
  Residency best{0, 0};
  for (int blocks = few_items ? 1 : tile.blocks_per_sm; blocks >= 1; --blocks) {
    const int slots = slots_that_fit(tile, device, blocks);
    if (slots < 2) continue;
    const int in_flight = (slots - 1) * tile.slot_bytes * blocks;
    if (in_flight >= needed) return {blocks, slots};
    if (best.blocks == 0 || in_flight > (best.slots - 1) * tile.slot_bytes * best.blocks) best = {blocks, slots};
  }
  if (best.blocks == 0) {
    throw std::invalid_argument("h: expected at most " + std::to_string(tile.head_tile) + " heads whose tiles fit in " +
                                std::to_string(device.smem_per_block) +
                                " bytes of shared memory, got h=" + std::to_string(h));
  }
  return best;
}

}  // namespace

int bytes_in_flight_needed(int capability) {
  // 2 x bandwidth x latency per SM, plus what arrives during the softmax of a segment: 52 + 16 KB on H100/H200,
  // 25 + 16 KB on A100, 11 KB on the GDDR parts. Estimates until measured.
  if (capability >= 90) return 68 * 1024;
  if (capability == 80) return 41 * 1024;
  return 11 * 1024;
}

int slots_that_fit(const TileShape& tile, const DeviceLimits& device, int blocks) {
  const int per_block = std::min(device.smem_per_block, device.smem_per_sm / blocks - kReservedPerBlock);
  int slots = 0;
  while (slots < tile.max_slots && int(smem_layout(tile, slots + 1).total) <= per_block) ++slots;
  return slots;
}

int best_splits(const TileShape& tile, int h, int64_t L) {
  const double row_bytes = double(L) * (tile.Dk + tile.Dv) * tile.cache_bytes;
  const double partial_bytes = 4.0 * h * tile.Dv;
  return std::max(1, int(std::lround(std::sqrt(row_bytes / partial_bytes))));
}

DecodePlan plan_decode(const TileShape& tile, const PlanRequest& r, const DeviceLimits& device) {
  DecodePlan plan{};
  const int64_t bound =
      r.max_selected >= 0 ? std::min<int64_t>(r.max_selected, INT32_MAX) : std::min(kAssumedSelected, r.S_kv);
  const int64_t tiles = std::max<int64_t>(1, ceil_div(bound, tile.rows_k));
  int wanted = int(std::min<int64_t>(best_splits(tile, r.h, bound), tiles));
  // Up to twice the portable cluster size: a little less parallelism, but no second kernel and no workspace.
  const bool clusters = device.capability >= 90 && !r.batch_invariant && r.num_splits == 0;
  if (clusters && wanted > kMaxClusterSize && wanted <= 2 * kMaxClusterSize) wanted = kMaxClusterSize;
  const bool few_items = r.rows * wanted <= device.sm_count;
  const Residency residency = choose_residency(tile, r.h, device, few_items);
  const int resident = residency.blocks * device.sm_count;

  plan.blocks_per_sm = residency.blocks;
  plan.smem = smem_layout(tile, residency.slots);
  plan.min_split_tokens = 16;
  int64_t full_rows = r.rows / resident * resident;
  if (r.batch_invariant) {
    full_rows = 0;
    plan.num_splits = kInvariantSplits;
    plan.min_split_tokens = kInvariantTokens;
  } else if (r.num_splits > 0) {
    full_rows = r.num_splits == 1 ? r.rows : 0;
    plan.num_splits = r.num_splits;
  } else {
    // Whole rows fill the SMs in waves; what is left over is cut so that the last wave is full as well.
    const int64_t left = r.rows - full_rows;
    plan.num_splits = left == 0 ? 1 : int(std::min<int64_t>(wanted, resident / left));
    if (plan.num_splits <= 1) full_rows = r.rows;
  }
  plan.num_splits = std::max(1, plan.num_splits);
  const int64_t split_rows = r.rows - full_rows;
  const int64_t items = full_rows + split_rows * plan.num_splits;
  if (items > INT32_MAX)
    throw std::invalid_argument("q: expected fewer than 2^31 work items, got " + std::to_string(items));
  plan.full_rows = int(full_rows);
  plan.split_rows = int(split_rows);
  plan.grid = int(std::min<int64_t>(items, resident));
  const int64_t partial = int64_t(r.h) * (cluster_head_stride(tile.Dv) + 2) * 4;
  // Only where every block has one item and an eighth of the SMs stays free: a cluster needs its blocks on one GPC at
  // once, GPCs do not divide evenly into clusters, and one that had to wait for others would double the time. Never for
  // batch_invariant, where the same code has to merge a row in every batch.
  const bool room = items * 8 <= int64_t(resident) * 7 || r.num_splits > 0;
  plan.cluster = device.capability >= 90 && !r.batch_invariant && room && full_rows == 0 && plan.num_splits >= 2 &&
                 plan.num_splits <= kMaxClusterSize && items == plan.grid &&
                 partial <= int64_t(residency.slots) * tile.slot_bytes;
  plan.workspace_floats = plan.cluster ? 0 : split_rows * plan.num_splits * r.h * (tile.Dv + 2);
  return plan;
}

}  // namespace nsa_sel

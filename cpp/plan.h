// plan.h - from a problem's shape to a launch: shared memory, resident blocks, splits, workspace. Pure host arithmetic.
#pragma once
#include <cstdint>

#include "tile_shape.h"

namespace nsa_sel {

struct DeviceLimits {
  int sm_count;
  int capability;      // 10 * major + minor
  int smem_per_block;  // opt-in limit of one block, bytes
  int smem_per_sm;     // bytes
};

struct PlanRequest {
  int64_t rows;  // B * S * G
  int h;
  int64_t max_selected;  // bound on L, or -1: unknown
  int64_t S_kv;
  bool batch_invariant;
  int num_splits;  // 0: choose
};

struct DecodePlan {
  SmemLayout smem;
  int blocks_per_sm;
  int grid;
  int full_rows;   // rows that one block runs whole
  int split_rows;  // the rest, num_splits blocks each
  int num_splits;
  int min_split_tokens;
  bool cluster;              // reduced through distributed shared memory; no workspace
  int64_t workspace_floats;  // partial_o then partial_ml
};

// Bytes that must be in flight per SM to keep its share of the memory bandwidth busy (Little's law, see
// docs/design.md).
int bytes_in_flight_needed(int capability);

// Ring slots that fit when `blocks` blocks share an SM; less than 2 means that the configuration does not fit.
int slots_that_fit(const TileShape& tile, const DeviceLimits& device, int blocks);

// s* = sqrt(R / P): R bytes of a row's K and V, P bytes of one split's partial; the point where halving the stream time
// no longer pays for the partials to merge. NSA (L 1024, 192/128, h 16): R = 1024 * 640 = 655,360, P = 4 * 16 * 128 =
// 8,192, s* = sqrt(80) = 8.9.
int best_splits(const TileShape& tile, int h, int64_t L);

// Throws std::invalid_argument when no configuration fits the device.
DecodePlan plan_decode(const TileShape& tile, const PlanRequest& request, const DeviceLimits& device);

}  // namespace nsa_sel

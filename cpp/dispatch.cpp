#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "instances.h"

namespace nsa_sel {
namespace {

constexpr double kLog2E = 1.4426950408889634;

int trailing_zeros(uint64_t x) { return x == 0 ? 64 : __builtin_ctzll(x); }

// Row offsets are 32-bit counts of units. 16 bytes a unit reach 64 GiB; a pool that interleaves many layers may be
// wider, but then its strides have more factors of two, and so may the unit.
int choose_unit_shift(const DecodeRequest& r) {
  const int64_t tokens = r.page_size > 0 ? r.page_size : r.S_kv;
  const uint64_t bytes = bytes_of(Cache(r.cache));
  int shift = 12;
  for (const int64_t* strides : {r.k_strides, r.v_strides}) {
    // Nobody steps along a dimension of one: its stride may be anything.
    if (tokens > 1) shift = std::min(shift, trailing_zeros(uint64_t(strides[2]) * bytes));
    if (r.num_pages > 1) shift = std::min(shift, trailing_zeros(uint64_t(strides[0]) * bytes));
  }
  return shift;
}

uint32_t units(int64_t elements, int element_bytes, int shift) {
  return uint32_t(uint64_t(elements) * uint64_t(element_bytes) >> shift);
}

void check_reach(const DecodeRequest& r, const int64_t* strides, int shift, const char* name) {
  const int64_t tokens = r.page_size > 0 ? r.page_size : r.S_kv;
  int64_t reach = std::max<int64_t>(tokens - 1, 0) * strides[2];
  if (r.page_size > 0) reach += std::max<int64_t>(r.num_pages - 1, 0) * strides[0];
  if (uint64_t(reach) * uint64_t(bytes_of(Cache(r.cache))) >> shift >= 0xffffffffull) {
    throw std::invalid_argument(std::string(name) + ": expected rows within 2^32 units of " +
                                std::to_string(1ll << shift) + " bytes, got a span of " + std::to_string(reach) +
                                " elements");
  }
}

// m = ceil(2^(31 + l) / d) with l = ceil(log2 d): the error x (m d - 2^(31 + l)) / d stays under 2^(31 + l) / d for x <
// 2^31, so the quotient is exact.
Divisor divisor(int64_t d) {
  uint32_t l = 0;
  while ((int64_t(1) << l) < d) ++l;
  return {uint32_t(((uint64_t(1) << (31 + l)) + uint64_t(d) - 1) / uint64_t(d)), l};
}

ScaleParams scales(const DecodeRequest& r, const float* values, const int64_t* strides, int64_t per_token,
                   const char* name) {
  ScaleParams s{values, r.page_size > 0 ? 0 : strides[0], strides[1], 0, 0, int32_t(values != nullptr && per_token)};
  if (!s.per_token) return s;
  const auto bytes = [&](int64_t stride) {
    if (stride < 0 || stride > (UINT32_MAX >> 2)) {
      throw std::invalid_argument(std::string(name) +
                                  ": expected strides under 2^30 elements from token to token, got " +
                                  std::to_string(stride));
    }
    return uint32_t(stride) * 4;
  };
  const int64_t tokens = r.page_size > 0 ? r.page_size : r.S_kv;
  if (tokens > 1) s.bytes_token = bytes(strides[2]);
  if (r.page_size > 0 && r.num_pages > 1) s.bytes_page = bytes(strides[0]);
  return s;
}

int checked_int32(int64_t value, const char* name) {
  if (value < 0 || value > INT32_MAX - 63) {  // loops step by 32
    throw std::invalid_argument(std::string(name) + ": expected 0 <= " + name + " <= 2^31 - 64, got " +
                                std::to_string(value));
  }
  return int(value);
}

}  // namespace

void DecodeLaunch::set_workspace(float* workspace) {
  if (!needs_combine()) return;  // whole rows and clusters: both stay null, an offset from null would be undefined
  const int64_t parts = int64_t(plan.split_rows) * plan.num_splits * decode.h;
  decode.partial_o = workspace;
  decode.partial_ml = workspace + (plan.workspace_floats - 2 * parts);
  combine.partial_o = decode.partial_o;
  combine.partial_ml = decode.partial_ml;
}

DecodeLaunch prepare_decode(const DecodeRequest& r, const DeviceLimits& device) {
  DecodeLaunch launch{};
  launch.instance = find_instance(Dtype(r.dtype), int(r.Dk), int(r.Dv), int(std::min<int64_t>(r.h, 1 << 20)),
                                  Loads(r.loads), Cache(r.cache));
  if (launch.instance < 0) {
    throw std::invalid_argument("q: expected dims and heads of a compiled instance, got Dk=" + std::to_string(r.Dk) +
                                ", Dv=" + std::to_string(r.Dv) + ", h=" + std::to_string(r.h));
  }
  if (Loads(r.loads) == Loads::kBulk && device.capability < 90) {
    throw std::invalid_argument("loads: expected 'cp.async' below compute capability 9.0, got 'bulk'");
  }
  const InstanceKey& key = kInstances[launch.instance];
  const TileShape tile = tile_shape(key.Dk, key.Dv, key.head_tile, key.loads, key.cache);

  DecodeParams& p = launch.decode;
  p.q = r.q, p.k = r.k, p.v = r.v, p.selection = r.selection;
  p.counts = r.counts, p.seq_lens = r.seq_lens;
  p.block_table = r.block_table, p.table_rows = r.table_rows;
  p.out = r.out, p.lse = r.lse;
  p.q_stride_b = r.q_strides[0], p.q_stride_s = r.q_strides[1], p.q_stride_g = r.q_strides[2],
  p.q_stride_h = r.q_strides[3];
  p.out_stride_b = r.out_strides[0], p.out_stride_s = r.out_strides[1];
  p.out_stride_g = r.out_strides[2], p.out_stride_h = r.out_strides[3];
  p.k_stride_b = r.k_strides[0], p.k_stride_g = r.k_strides[1];
  p.v_stride_b = r.v_strides[0], p.v_stride_g = r.v_strides[1];
  const int64_t index_bytes = r.index_is_64 ? 8 : 4;
  p.sel_bytes_b = r.sel_strides[0] * index_bytes, p.sel_bytes_s = r.sel_strides[1] * index_bytes;
  p.sel_bytes_g = r.sel_strides[2] * index_bytes, p.sel_bytes_n = r.sel_strides[3] * index_bytes;
  p.counts_stride_b = r.counts_strides[0], p.counts_stride_s = r.counts_strides[1];
  p.counts_stride_g = r.counts_strides[2];
  p.seq_lens_stride = r.seq_lens_stride, p.table_stride = r.table_stride, p.table_rows_stride = r.table_rows_stride;

  p.unit_shift = choose_unit_shift(r);
  if (p.unit_shift < 4) throw std::invalid_argument("k, v: expected strides that are multiples of 16 bytes");
  check_reach(r, r.k_strides, p.unit_shift, "k");
  check_reach(r, r.v_strides, p.unit_shift, "v");
  const auto row_units = [&](int64_t elements) { return units(elements, tile.cache_bytes, int(p.unit_shift)); };
  p.k_unit_token = row_units(r.k_strides[2]), p.v_unit_token = row_units(r.v_strides[2]);
  p.k_unit_page = r.page_size > 0 ? row_units(r.k_strides[0]) : 0;
  p.v_unit_page = r.page_size > 0 ? row_units(r.v_strides[0]) : 0;

  p.S = checked_int32(r.S, "S"), p.G = checked_int32(r.G, "G"), p.h = int(r.h), p.n = checked_int32(r.n, "n");
  p.S_kv = checked_int32(r.S_kv, "S_kv");
  p.page_size = checked_int32(r.page_size, "page_size"), p.num_pages = checked_int32(r.num_pages, "num_pages");
  p.num_tables = checked_int32(r.num_tables, "num_tables");
  p.block_size = int(std::min<int64_t>(r.block_size, std::max<int64_t>(r.S_kv, 1)));  // longer ones cover as much
  p.last_block = p.block_size > 0 ? (p.S_kv - 1) / p.block_size : 0;                  // S_kv 0: no token is visible
  p.chunk_slots = std::min(32, INT32_MAX / std::max(p.S_kv, 1));
  p.by_S = divisor(std::max(p.S, 1)), p.by_G = divisor(std::max(p.G, 1)), p.by_page = divisor(std::max(p.page_size, 1));
  p.index_is_64 = int(r.index_is_64), p.causal = int(r.causal);
  p.scale_log2 = float(r.scale * kLog2E);
  if (!std::isfinite(p.scale_log2)) {
    throw std::invalid_argument("softmax_scale: expected a value that fp32 holds, got " + std::to_string(r.scale));
  }
  if (Cache(r.cache) != Cache::kSame) {
    p.out_scale = float(r.v_factor);
    p.k_scale = scales(r, r.k_scale, r.k_scale_strides, r.k_scale_per_token, "k_scale");
    p.v_scale = scales(r, r.v_scale, r.v_scale_strides, r.v_scale_per_token, "v_scale");
  }

  const PlanRequest request{r.B * r.S * r.G,        int(r.h),         r.max_selected, r.S_kv,
                            r.batch_invariant != 0, int(r.num_splits)};
  launch.plan = plan_decode(tile, request, device);
  const DecodePlan& plan = launch.plan;
  p.full_rows = plan.full_rows;
  p.num_splits = plan.num_splits, p.num_items = plan.full_rows + plan.split_rows * plan.num_splits;
  p.by_splits = divisor(plan.num_splits);
  p.min_split_tokens = plan.min_split_tokens;
  p.cluster = plan.cluster ? 1 : 0;
  p.smem = plan.smem;

  CombineParams& c = launch.combine;
  c.out = r.out, c.lse = r.lse;
  c.out_stride_b = p.out_stride_b, c.out_stride_s = p.out_stride_s;
  c.out_stride_g = p.out_stride_g, c.out_stride_h = p.out_stride_h;
  c.S = p.S, c.G = p.G, c.h = p.h, c.Dv = int(r.Dv);
  c.by_S = p.by_S, c.by_G = p.by_G;
  c.chunks = (c.h * c.Dv / 4 + kCombineThreads - 1) / kCombineThreads;
  c.by_chunks = divisor(c.chunks), c.by_columns = divisor(c.Dv / 4);
  c.first_row = plan.full_rows, c.split_rows = plan.split_rows, c.num_splits = plan.num_splits;
  launch.programmatic = device.capability >= 90;
  return launch;
}

}  // namespace nsa_sel

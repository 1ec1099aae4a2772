// dispatch.h - from checked tensors (pointers, sizes, strides) to the parameters of the two kernels. Pure host
// arithmetic: the bindings and the host run of the kernel both come through here.
#pragma once
#include <cstdint>

#include "params.h"
#include "plan.h"

namespace nsa_sel {

// Fields of one width, so that other languages can mirror it. Strides in elements.
struct DecodeRequest {
  const void* q;  // [B, S, G, h, Dk]
  const void* k;  // [B, G, S_kv, Dk]; paged: [P, G, page_size, Dk]
  const void* v;
  const void* selection;       // ranges [B, S, G, n, 2] or block_indices [B, S, G, n]
  const int32_t* counts;       // [B, S, G] or null
  const int32_t* seq_lens;     // [B] or null
  const int32_t* block_table;  // [R, max_pages] or null
  const int32_t* table_rows;   // [B] or null
  void* out;                   // [B, S, G, h, Dv]
  float* lse;                  // [B, S, G, h] contiguous or null
  int64_t dtype;               // Dtype
  int64_t B, S, G, h, Dk, Dv, S_kv, n;
  int64_t page_size, num_pages, num_tables;  // page_size 0: not paged
  int64_t block_size;                        // 0: ranges
  int64_t index_is_64, causal;
  int64_t max_selected;                 // -1: unknown
  int64_t batch_invariant, num_splits;  // num_splits 0: choose
  int64_t loads;                        // Loads
  int64_t q_strides[4];                 // b, s, g, h
  int64_t k_strides[3], v_strides[3];   // b or page, g, token
  int64_t out_strides[4];               // b, s, g, h
  int64_t sel_strides[4];               // b, s, g, n
  int64_t counts_strides[3];            // b, s, g
  int64_t seq_lens_stride, table_stride, table_rows_stride;
  double scale;
};

struct DecodeLaunch {
  int instance;  // index into kInstances
  DecodePlan plan;
  DecodeParams decode;
  CombineParams combine;
  bool programmatic;  // the combine kernel may be set up while the decode kernel drains (sm_90)
  bool needs_combine() const { return plan.workspace_floats > 0; }
  // The caller allocates plan.workspace_floats floats, 16-byte aligned, and hands them over before launching.
  void set_workspace(float* workspace);
};

// Throws std::invalid_argument when no instance, layout or device configuration fits.
DecodeLaunch prepare_decode(const DecodeRequest& request, const DeviceLimits& device);

}  // namespace nsa_sel

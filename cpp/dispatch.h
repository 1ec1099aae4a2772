// dispatch.h - from checked tensors (pointers, sizes, strides) to the parameters of the two kernels. Pure host
// arithmetic: the bindings and the host run of the kernel both come through here.
#pragma once
#include <cstddef>
#include <cstdint>

#include "params.h"
#include "plan.h"

namespace nsa_sel {

// Members of one width, so that Python can pack one as bytes (src/nsa_sel/backends/_request.py). Strides in elements.
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
  const float* k_scale;        // float8: [1], [G] or a token of the cache each, by its strides; null: a constant
  const float* v_scale;
  int64_t dtype;  // Dtype
  int64_t B, S, G, h, Dk, Dv, S_kv, n;
  int64_t page_size, num_pages, num_tables;  // page_size 0: not paged
  int64_t block_size;                        // 0: ranges
  int64_t index_is_64, causal;
  int64_t max_selected;                 // -1: unknown
  int64_t batch_invariant, num_splits;  // num_splits 0: choose
  int64_t loads;                        // Loads
  int64_t cache;                        // Cache
  int64_t k_scale_per_token, v_scale_per_token;
  int64_t q_strides[4];                // b, s, g, h
  int64_t k_strides[3], v_strides[3];  // b or page, g, token
  int64_t out_strides[4];              // b, s, g, h
  int64_t sel_strides[4];              // b, s, g, n
  int64_t counts_strides[3];           // b, s, g
  int64_t seq_lens_stride, table_stride, table_rows_stride;
  int64_t k_scale_strides[3], v_scale_strides[3];  // b or page, g, token
  double scale;
  double v_factor;  // a constant that V is multiplied by; K's is part of scale
};

// Name, offset and number of 64-bit values of each member, in order: Python compares its own list with this one.
struct RequestField {
  const char* name;
  size_t offset, count;
};
inline constexpr RequestField kRequestFields[] = {
#define NSA_SEL_FIELD(member) {#member, offsetof(DecodeRequest, member), sizeof(DecodeRequest::member) / 8}
    NSA_SEL_FIELD(q),
    NSA_SEL_FIELD(k),
    NSA_SEL_FIELD(v),
    NSA_SEL_FIELD(selection),
    NSA_SEL_FIELD(counts),
    NSA_SEL_FIELD(seq_lens),
    NSA_SEL_FIELD(block_table),
    NSA_SEL_FIELD(table_rows),
    NSA_SEL_FIELD(out),
    NSA_SEL_FIELD(lse),
    NSA_SEL_FIELD(k_scale),
    NSA_SEL_FIELD(v_scale),
    NSA_SEL_FIELD(dtype),
    NSA_SEL_FIELD(B),
    NSA_SEL_FIELD(S),
    NSA_SEL_FIELD(G),
    NSA_SEL_FIELD(h),
    NSA_SEL_FIELD(Dk),
    NSA_SEL_FIELD(Dv),
    NSA_SEL_FIELD(S_kv),
    NSA_SEL_FIELD(n),
    NSA_SEL_FIELD(page_size),
    NSA_SEL_FIELD(num_pages),
    NSA_SEL_FIELD(num_tables),
    NSA_SEL_FIELD(block_size),
    NSA_SEL_FIELD(index_is_64),
    NSA_SEL_FIELD(causal),
    NSA_SEL_FIELD(max_selected),
    NSA_SEL_FIELD(batch_invariant),
    NSA_SEL_FIELD(num_splits),
    NSA_SEL_FIELD(loads),
    NSA_SEL_FIELD(cache),
    NSA_SEL_FIELD(k_scale_per_token),
    NSA_SEL_FIELD(v_scale_per_token),
    NSA_SEL_FIELD(q_strides),
    NSA_SEL_FIELD(k_strides),
    NSA_SEL_FIELD(v_strides),
    NSA_SEL_FIELD(out_strides),
    NSA_SEL_FIELD(sel_strides),
    NSA_SEL_FIELD(counts_strides),
    NSA_SEL_FIELD(seq_lens_stride),
    NSA_SEL_FIELD(table_stride),
    NSA_SEL_FIELD(table_rows_stride),
    NSA_SEL_FIELD(k_scale_strides),
    NSA_SEL_FIELD(v_scale_strides),
    NSA_SEL_FIELD(scale),
    NSA_SEL_FIELD(v_factor),
#undef NSA_SEL_FIELD
};

constexpr bool fields_cover_the_request() {
  size_t offset = 0;
  for (const RequestField& field : kRequestFields) {
    if (field.offset != offset) return false;
    offset += 8 * field.count;
  }
  return offset == sizeof(DecodeRequest);
}
static_assert(fields_cover_the_request(), "every member of DecodeRequest stands in kRequestFields, in its place");

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

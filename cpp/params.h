// params.h - plain data shared by the host planner, the launcher and the device code.
//
// Letters follow docs/glossary: B requests, S query positions, G KV groups, h query heads per group, L selected tokens.
#pragma once
#include <cstdint>

namespace nsa_sel {

enum class Dtype : int32_t { kFloat16 = 0, kBfloat16 = 1 };

// What K and V hold: elements of q's dtype, or one byte an element, which the consumers widen to q's dtype.
enum class Cache : int32_t { kSame = 0, kFloat8E4m3 = 1 };

// How tiles come into the ring. Bulk copies are an experiment: sm_90, chosen by name only.
enum class Loads : int32_t { kCpAsync = 0, kBulk = 1 };

// Byte offsets of one block's shared memory, worked out by cpp/tile_shape.h for a number of ring slots.
struct SmemLayout {
  uint32_t barriers;  // mbarriers: ring full/empty, map full/empty, q full/empty
  uint32_t segments;  // [map slots] SegmentHeader
  uint32_t map;       // [map slots][2][segment] uint32: K then V row offsets
  uint32_t scales;    // float8: [map slots][2][segment] fp32, of each token's K and V row; [map slots] RowScales
  uint32_t row_max;   // [token warps][head tile] fp32
  uint32_t row_sum;   // [token warps][head tile] fp32
  uint32_t q;         // [Dk/64][head tile][64] T, 128-byte rows, swizzled; rows of a used unit beyond h are zero
  uint32_t p;         // [units][segment][8] T: probabilities of a segment, 8 heads in 16 bytes a token
  uint32_t slots;     // ring of K and V tiles, num_slots * slot_bytes; 1024-byte aligned
  uint32_t total;
  int32_t num_slots, num_barriers;
};

// Division of 0 <= x < 2^31 without dividing: x / d = umulhi(2 x, multiplier) >> shift. A 32-bit division is about 25
// instructions on the device, a 64-bit one a call of 100.
struct Divisor {
  uint32_t multiplier, shift;
};

// The factors that a float8 cache's K or V comes with. Constants are folded into the launch's own factors; a factor a
// group is read by row, a factor a token with the token.
struct ScaleParams {
  const float* values;               // null: a constant
  int64_t stride_b, stride_g;        // in elements; stride_b unused when paged
  uint32_t bytes_token, bytes_page;  // as a row offset's, in bytes
  int32_t per_token;
};

// Everything one decode launch needs. Strides are in elements; unit strides are in units of `1 << unit_shift` bytes.
struct DecodeParams {
  const void* q;               // [B, S, G, h, Dk]
  const void* k;               // [B, G, S_kv, Dk]; paged: [P, G, page_size, Dk]
  const void* v;               // [B, G, S_kv, Dv]; paged: [P, G, page_size, Dv]
  const void* selection;       // ranges [B, S, G, n, 2] or block_indices [B, S, G, n], int32 or int64
  const int32_t* counts;       // [B, S, G] or null: all n slots of the selection are in use
  const int32_t* seq_lens;     // [B] or null: S_kv tokens in every request
  const int32_t* block_table;  // [R, max_pages] or null: not paged
  const int32_t* table_rows;   // [B] or null: request b uses row b
  void* out;                   // [B, S, G, h, Dv]
  float* lse;                  // [B, S, G, h] contiguous, or null
  float* partial_o;            // [split_rows, num_splits, h, Dv]: unnormalised O of each split
  float* partial_ml;           // [split_rows, num_splits, h, 2]: running max (base 2) and sum of each split

  int64_t q_stride_b, q_stride_s, q_stride_g, q_stride_h;
  int64_t out_stride_b, out_stride_s, out_stride_g, out_stride_h;
  int64_t k_stride_b, k_stride_g;  // stride_b unused when paged
  int64_t v_stride_b, v_stride_g;
  int64_t sel_bytes_b, sel_bytes_s, sel_bytes_g, sel_bytes_n;  // strides of the selection, in bytes
  int64_t counts_stride_b, counts_stride_s, counts_stride_g;
  int64_t seq_lens_stride, table_stride, table_rows_stride;
  uint32_t k_unit_token, k_unit_page, v_unit_token, v_unit_page;  // row offsets within one (b, g) or one pool, in units
  int32_t unit_shift;

  int32_t S, G, h, n;
  int32_t S_kv;        // max_pages * page_size when paged
  int32_t page_size;   // 0: not paged
  int32_t num_pages;   // P
  int32_t num_tables;  // R
  int32_t block_size;  // 0: selection holds ranges; else at most max(1, S_kv)
  int32_t last_block;  // id of the last block that starts inside the cache
  int32_t index_is_64, causal;
  int32_t chunk_slots;  // slots of a selection looked at together: 32, fewer where their tokens could pass 2^31
  Divisor by_S, by_G, by_page, by_splits;
  float scale_log2;  // softmax scale * log2(e): logits are kept in base 2
  float out_scale;   // float8: V's constant factor
  ScaleParams k_scale, v_scale;

  // The plan: items [0, full_rows) are whole rows, the rest are (row, split) pairs, split innermost.
  int32_t full_rows, num_splits, num_items;
  int32_t min_split_tokens;  // a split takes at least this many tokens, so short rows leave later splits empty
  int32_t cluster;           // 1: the splits of a row are the blocks of a cluster, one item each
  SmemLayout smem;
};

constexpr int kCombineThreads = 128;  // a thread owns four neighbouring columns of one head

// The second kernel of a split launch: merges the partials of each split row in split order.
struct CombineParams {
  const float* partial_o;   // [split_rows, num_splits, h, Dv]
  const float* partial_ml;  // [split_rows, num_splits, h, 2]
  void* out;                // [B, S, G, h, Dv]
  float* lse;               // [B, S, G, h] or null
  int64_t out_stride_b, out_stride_s, out_stride_g, out_stride_h;
  int32_t S, G, h, Dv;
  int32_t first_row, split_rows, num_splits;
  int32_t chunks;                             // blocks a row
  Divisor by_S, by_G, by_chunks, by_columns;  // by_columns: Dv / 4
};

}  // namespace nsa_sel

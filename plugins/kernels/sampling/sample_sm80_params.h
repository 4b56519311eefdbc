// Arguments of the scoring kernels for mma.sync, already resolved by the host.
#pragma once

#include <cstdint>

namespace sample_attention {

constexpr int kSampleSm80Rows = 128;  // slice rows of one work item

// A call's rows are seen as `classes` strided slices: row residue + row_stride * m against the keys key_residue + key_stride * n. `residue` has stride slices
// on both sides; `tile` has one slice of rows against all keys.
struct SampleSm80Params {
  const void *query;                                       // [B, Hq, S, D]
  const void *key;                                         // [B, Hkv, T, D]
  int64_t query_b, query_h, query_s, key_b, key_h, key_s;  // strides in elements, multiples of 8
  const float *weight;                                     // [B, Hkv, key slices, weight_row], zeros behind the last key
  float *lse;                                              // [B, Hq, classes, groups, 128] base-2 log-sum-exp of each row's sample, +inf: none
  float *pieces;                                           // [thread blocks, pieces, 128] one pass of `tile`
  float *mass;                                             // [B, Hq, tiles, blocks] weighted probability of the sampled pairs inside each key block
  const float *alpha;                                      // [Hq], or null
  const int32_t *bounds;                                   // [B, 2], or null
  int32_t *ticket;                                         // one counter, zero at launch
  float alpha_all;                                         // used when alpha is null
  float scale, softcap;
  int32_t weight_row;  // a multiple of 128
  int32_t batch, heads, kv_heads, queries, keys;
  int32_t first_tile, tiles;   // query tiles of this launch
  int32_t blocks;              // row length of mass
  int32_t classes;             // slices: stride for residue, 1 for tile
  int32_t row_log2, key_log2;  // log2 of row_stride and key_stride
  int32_t tile_rows_log2;      // log2 of the slice rows of one query tile: block_q / row_stride
  int32_t block_keys_log2;     // log2 of the slice keys of one key block: block_k / key_stride
  int32_t full_groups;         // groups of 128 slice rows made of the rows below full_rows
  int32_t groups;              // full_groups, and one for the last tile of `tile` when it is cut short (its slice has another residue)
  int32_t full_rows;           // slice rows of the launch outside the cut tile
  int32_t piece_log2;          // log2 of the keys of one piece: min(block_k, 64)
  int32_t piece_count;         // pieces of one thread block
};

}  // namespace sample_attention

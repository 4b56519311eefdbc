// Arguments of the two scoring passes, already resolved by the host.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sample_attention {

// A scoring pass sees the rows of a call as `classes` strided slices: row residue + row_stride * m against the keys key_residue + key_stride * n.
// `residue` has stride slices on both sides; `tile` has one slice of rows against all keys. Slices whose residue is below the remainder
// are one element longer than the others, hence two maps: neither addresses a byte outside the tensor.
struct SliceMaps {
  CUtensorMap longer;    // [D, remainder, ceil(rows / stride), H, B]
  CUtensorMap shorter;   // [D, stride, floor(rows / stride), H, B]
  int32_t longer_count;  // remainder: residues below it use the first map
};

constexpr int kSampleRows = 256;  // slice rows of one work item

struct SampleParams {
  SliceMaps query, key;
  float *lse;             // [B, Hq, classes, groups, 256] base-2 log-sum-exp of each row's sample, +inf for a row that has none
  float *mass;            // [B, Hq, tiles, blocks] weighted probability of the sampled pairs inside each key block
  const float *weight;    // [B, Hkv, key slices, weight_row], zeros behind the last key
  int32_t weight_row;     // a multiple of 128
  const float *alpha;     // [Hq], or null
  const int32_t *bounds;  // [B, 2], or null
  int32_t *ticket;        // one counter, zero at launch
  float alpha_all;        // used when alpha is null
  float scale, softcap;
  int32_t batch, heads, kv_heads, queries, keys;
  int32_t first_tile, tiles;   // query tiles of this launch
  int32_t blocks;              // row length of mass
  int32_t classes;             // slices: stride for residue, 1 for tile
  int32_t row_log2, key_log2;  // log2 of row_stride and key_stride
  int32_t tile_rows_log2;      // log2 of the slice rows of one query tile: block_q / row_stride
  int32_t block_keys_log2;     // log2 of the slice keys of one key block: block_k / key_stride
  int32_t full_groups;         // groups of 256 slice rows made of the rows below full_rows
  int32_t groups;              // full_groups, and one for the last tile of `tile` when it is cut short (its slice has another residue)
  int32_t full_rows;           // slice rows of the launch outside the cut tile
};

struct WeightParams {
  const void *value;  // [B, Hkv, T, D]
  int64_t value_b, value_h, value_s;
  float *weight;  // as SampleParams
  int32_t weight_row, key_log2, batch, kv_heads, keys;
  int32_t by_value;  // 1: L2 norms of the value rows, 0: ones
};

}  // namespace sample_attention

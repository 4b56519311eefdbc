// Arguments of scoring and of its reduction to block masses, already resolved by the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace sample_attention {

// Scoring sees the rows of a call as `classes` strided slices: row residue + row_stride * m against the keys key_residue + key_stride * n.
// `residue` has stride slices on both sides; `tile` has one slice of rows against all keys. Slices whose residue is below the remainder
// are one element longer than the others, hence two maps: neither addresses a byte outside the tensor.
struct SliceMaps {
  CUtensorMap longer;    // [D, remainder, ceil(rows / stride), H, B]
  CUtensorMap shorter;   // [D, stride, floor(rows / stride), H, B]
  int32_t longer_count;  // remainder: residues below it use the first map
};

constexpr int kSampleRows = 256;      // slice rows of one group
constexpr int kSampleKeys = 128;      // slice keys of one key tile
constexpr int kSampleTileLimit = 32;  // key tiles of one work item: longer rows are split

// One entry of the table is what one slice row gives to one key block inside one key tile, a 16-bit float under the row's own power of two (`reference`).
// A key tile meets `slots` blocks of a row: 128 / (slice keys of a block), 1 .. 64.
constexpr int sample_slots_log2(int block_keys_log2) { return block_keys_log2 < 7 ? 7 - block_keys_log2 : 0; }

struct SampleParams {
  SliceMaps query, key;
  uint16_t *table;        // [head_count, slice_tiles, query tiles of 256 slice rows, classes, slice rows of a query tile, slots] binary16
  float *reference;       // the same without slots: base-2 exponents. See table_row
  float *mass;            // [B, Hq, tiles, nK] weighted probability of the sampled pairs inside each key block; written by the reduction
  float *lse;             // [head_count, classes, groups, splits, 256] base-2 log-sum-exp of each row's sample, +inf for a row that has none
  const float *weight;    // [B, Hkv, key slices, weight_row], zeros for keys that are not real
  int32_t weight_row;     // a multiple of 128
  const float *alpha;     // [Hq], or null
  const int32_t *bounds;  // [B, 2], or null
  int32_t *ticket;        // one counter, zero at launch; the reduction leaves it at zero
  float alpha_all;        // used when alpha is null
  float scale, softcap;
  int32_t batch, heads, kv_heads, queries, keys;
  int32_t first_head, head_count;   // of [B * Hq], of this launch; head_unit divides both
  int32_t head_unit;                // heads whose items are neighbours: they share keys
  int32_t first_tile, tiles;        // query tiles of this launch
  int32_t blocks;                   // nK
  int32_t classes;                  // slices: stride for residue, 1 for tile
  int32_t row_log2, key_log2;       // log2 of row_stride and key_stride
  int32_t dense_rows;               // query tiles that meet the last ones of the real keys keep all blocks: they are left out
  int32_t tile_rows_log2;           // log2 of the slice rows of one query tile: block_q / row_stride
  int32_t block_keys_log2;          // log2 of the slice keys of one key block: block_k / key_stride
  int32_t full_groups;              // groups of 256 slice rows made of the rows below full_rows
  int32_t groups;                   // full_groups, and one for the last tile of `tile` when it is cut short (its slice has another residue)
  int32_t full_rows;                // slice rows of the launch outside the cut tile
  int32_t splits;                   // work items of the longest row
  int32_t group_tiles, group_step;  // the table holds group_tiles + group_step * g key tiles for group g, group after group
  int32_t slice_tiles;              // their sum, for all groups
};

struct WeightParams {
  const void *value;  // [B, Hkv, T, D]
  int64_t value_b, value_h, value_s;
  float *weight;          // as SampleParams
  const int32_t *bounds;  // [B, 2], or null
  int32_t *tickets;       // set to zero
  int32_t ticket_count;
  int32_t weight_row, key_log2, batch, kv_heads, keys;
  int32_t by_value;  // 1: L2 norms of the value rows, 0: ones
};

// The table's entries under the rows' normalisers, summed over the rows of each query tile, for every block that begins at or before the last row of the tile.
// Nothing is written for heads that are full attention and for tiles that meet the last dense_rows.
cudaError_t launch_reduce(const SampleParams &params, cudaStream_t stream);

struct RetainParams : SampleParams {
  const int32_t *counts;   // [B, Hq, tiles] kept blocks of each query tile of the launch
  const int32_t *indices;  // [B, Hq, tiles, nK]
  float *retained;         // [B, Hq, call_tiles, 3] as Retained of core/path.h: minimum and sum over the sampled rows, and their number (int32)
  int32_t call_tiles;
};

// What the sampled rows of each query tile retain inside the listed blocks. The table must have been made with weights of one.
cudaError_t launch_retain(const RetainParams &params, cudaStream_t stream);

}  // namespace sample_attention

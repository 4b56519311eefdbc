// Arguments of the generic kernels: plain CUDA for every dtype, head size and device of compute capability 7.5 and newer.
#pragma once

#include "../common/retained.h"
#include "sample_attention/types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sample_attention::generic {

struct Tensor {
  const void *data;
  int64_t b, h, s;  // strides in elements
};

// What every stage needs to know of a call.
struct Inputs {
  Tensor query;             // [B, Hq, S, D]
  Tensor key;               // [B, Hkv, T, D]
  Tensor value;             // [B, Hkv, T, Dv]
  const int32_t *bounds;    // [B, 2], or null
  const uint8_t *key_mask;  // [B, T], or null
  const int32_t *only;      // [B], or null: the batch items to work on
  int32_t dtype, batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  float scale, softcap;
};

// The sampled rows of a launch, in `classes` sets of `slots`; set c is scored against every key (c is 0) or against the keys of one residue.
// `slots_per_tile` slots of a set belong to one query tile; a policy that selects for a whole head has one tile of all slots.
struct Samples {
  int32_t policy;
  int32_t classes;  // stride for residue, else 1
  int32_t slots;    // of one class
  int32_t slots_per_tile;
  int32_t first_row;  // of the first query tile
  int32_t tiles;      // query tiles of the launch; 1 for a whole head
  int32_t row_step;   // rows from slot to slot (not residue and column_slash)
  int32_t sample_rows, segment;
  int32_t block_q, block_k;
  float *lse;                        // [B, Hq, classes, slots] natural log-sum-exp of each row's sample, +inf for a row that has none
  const float *alpha, *alpha_slash;  // [Hq], or null
  float alpha_all, alpha_slash_all;  // alpha_slash_all is 0 for policies without one
};

struct RowsParams {
  Inputs in;
  Samples sample;
};

struct MassParams {
  Inputs in;
  Samples sample;
  const float *weight;        // [B, Hkv, T], or null: ones
  float *mass;                // [B, Hq, mass_rows, nK]
  unsigned long long *slash;  // [B, Hq, nK] in units of 2^-33, zero at launch; null: not wanted
  int32_t mass_rows, blocks;
};

struct WeighParams {
  Inputs in;
  float *weight;  // [B, Hkv, T]
};

struct SlashParams {
  const unsigned long long *slash;
  float *mass;  // [B, Hq, 2, nK], second row
  const int32_t *only;
  int32_t batch, heads, blocks;
};

// Selection for whole heads: which columns and distance classes stay.
struct PickParams {
  const float *mass;  // [B, Hq, rows, nK]
  uint8_t *keep;      // [B, Hq, rows, nK]
  int32_t *all;       // [B, Hq, rows] 1: keep every block of the head
  const float *alpha, *alpha_slash;
  float alpha_all, alpha_slash_all;
  const int32_t *only;
  int32_t batch, heads, rows, blocks;
};

struct ExpandParams {
  const uint8_t *keep;
  const int32_t *all;
  int32_t rows;
  const int32_t *bounds, *only;
  int32_t *counts, *indices;
  int32_t batch, heads, queries, keys;
  int32_t first_tile, tiles, blocks;
  int32_t block_q, block_k, window, sink, dense_rows;
};

struct RetainParams {
  Inputs in;
  Samples sample;
  const int32_t *counts;   // [B, Hq, tiles]
  const int32_t *indices;  // [B, Hq, tiles, nK]
  Retained *retained;      // [B, Hq, all_tiles]
  int32_t first_tile, tiles, all_tiles, blocks;
};

struct AttendParams {
  Inputs in;
  void *output;  // [B, Hq, S, Dv]
  int64_t output_b, output_h, output_s;
  float *lse;              // [B, Hq, S], or null
  const int32_t *counts;   // [B, Hq, list_tiles], or null: every key up to the diagonal
  const int32_t *indices;  // [B, Hq, list_tiles, capacity]
  int32_t first_tile, list_tiles, capacity, block_q, block_k;
  // Decode: the rows of a key/value head's query heads stand together, the keys are cut into ranges.
  float *partial;      // [splits, B, Hq, S, Dv], or null
  float *partial_lse;  // [splits, B, Hq, S], natural
  int32_t splits;
};

// multiprocessors bounds the grid where `only` may leave nothing to do.
cudaError_t launch_weigh(const WeighParams &params, cudaStream_t stream);
cudaError_t launch_rows(const RowsParams &params, int multiprocessors, cudaStream_t stream);
cudaError_t launch_mass(const MassParams &params, int multiprocessors, cudaStream_t stream);
cudaError_t launch_slash(const SlashParams &params, cudaStream_t stream);
cudaError_t launch_pick(const PickParams &params, cudaStream_t stream);
cudaError_t launch_expand(const ExpandParams &params, cudaStream_t stream);
cudaError_t launch_retain(const RetainParams &params, int multiprocessors, cudaStream_t stream);
cudaError_t launch_attend(const AttendParams &params, int multiprocessors, cudaStream_t stream);
cudaError_t launch_decode(const AttendParams &params, int multiprocessors, cudaStream_t stream);

}  // namespace sample_attention::generic

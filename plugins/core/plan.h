// What follows from a problem's shape alone for the sm90 kernels: tiles, slices, and the layout of their workspace.
#pragma once

#include "../kernels/prefill/attend_params.h"
#include "../kernels/sampling/sample_params.h"
#include "carver.h"
#include "path.h"
#include "table.h"

#include <cstdint>

namespace sample_attention {

constexpr int kMaxBlocks = 56 * 1024;  // floats in the 227 KiB of shared memory of the selection
constexpr int kTickets = 16;

struct Plan {
  int tiles, blocks;   // nQ of block_q rows, nK of block_k keys
  int tiles_per_list;  // 128-row tiles of one list: block_q / 128
  int classes, row_log2, key_log2, tile_rows_log2, block_keys_log2;
  int group_tiles;  // query tiles of one group of slice rows: the granule of a chunk
  int weight_row;   // floats of one key slice in the weights
  int splits;       // key ranges of decode

  explicit Plan(const sa_problem &problem);
};

struct SelectSpace {
  int32_t *tickets;  // [kTickets]
  float *weight;     // [B, Hkv, key slices, weight_row]
  float *ones;       // weights of one, for the certificate: the same array where values carry no weight
  char *table;       // tables of the heads of one launch
  int64_t table_bytes;

  // chunk: query tiles of one pass over sample and filter.
  SelectSpace(const sa_problem &problem, const Plan &plan, int chunk, void *base);
};

struct AttendSpace {
  int32_t *tickets;  // [kTickets]
  int32_t *order;    // [B * Hq * 128-row tiles]

  AttendSpace(const sa_problem &problem, const Plan &plan, void *base);
};

struct DecodeSpace {
  float *partial;      // [splits, B, Hq, S, D]
  float *partial_lse;  // [splits, B, Hq, S]

  DecodeSpace(const sa_problem &problem, const Plan &plan, void *base);
};

// Bounds of the above that do not fall when batch, queries or keys grow.
Need sm90_select_need(const sa_problem &problem);
int64_t sm90_attend_need(const sa_problem &problem);
int64_t decode_need(const sa_problem &problem);

}  // namespace sample_attention

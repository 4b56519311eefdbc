// Arguments of the block-sparse prefill kernel, already resolved by the host.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sample_attention {

constexpr int kAttendRows = 128;  // query rows of one work item: two consumer warpgroups of 64 rows, the height of a wgmma

struct AttendParams {
  CUtensorMap query;   // [B, Hq, S, D], box 128 rows x one slab
  CUtensorMap key;     // [B, Hkv, T, D], box unit rows x one slab
  CUtensorMap value;   // as key
  CUtensorMap output;  // [B, Hq, S, D], box 64 rows x one slab

  const int32_t *counts;   // [B, Hq, list_tiles], or null: every block up to the diagonal
  const int32_t *indices;  // [B, Hq, list_tiles, capacity]
  const int32_t *order;    // [items] work items, longest first inside a key/value head, or null: computed
  int32_t *ticket;         // one counter, zero at launch
  const int32_t *bounds;   // [B, 2], or null
  float *lse;              // [B, Hq, S], or null

  int32_t batch, heads, kv_heads, queries, keys;
  int32_t first_tile;      // first 128-row tile of this launch
  int32_t tiles;           // 128-row tiles of this launch
  int32_t list_tiles;      // tiles that the lists describe
  int32_t tiles_per_list;  // block_q / 128
  int32_t capacity;
  int32_t block_log2;  // log2 of block_k
  int32_t unit_log2;   // log2 of the keys of one TMA box: min(block_k, keys of a pipeline stage)
  float scale, softcap;
};

}  // namespace sample_attention

// Arguments of the block-sparse prefill kernels, already resolved by the host.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sample_attention {

constexpr int kAttendRows = 128;  // query rows of one work item: two consumer warpgroups of 64 rows, the height of a wgmma; four warps of 32 on sm_80

// Which keys each query tile reads, and what its scores become.
struct AttendWork {
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
  int32_t unit_log2;   // log2 of the keys that are addressed at once: min(block_k, keys of a pipeline stage)
  float scale, softcap;
};

// sm_90a: the copy engine's maps.
struct AttendParams : AttendWork {
  CUtensorMap query;   // [B, Hq, S, D], box 128 rows x one slab
  CUtensorMap key;     // [B, Hkv, T, D], box unit rows x one slab
  CUtensorMap value;   // as key
  CUtensorMap output;  // [B, Hq, S, D], box 64 rows x one slab
};

// sm_80: pointers, and strides in elements (multiples of 8).
struct AttendSm80Params : AttendWork {
  const void *query;  // [B, Hq, S, D]
  const void *key;    // [B, Hkv, T, D]
  const void *value;  // [B, Hkv, T, D]
  void *output;       // [B, Hq, S, D]
  int64_t query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s, output_b, output_h, output_s;
};

}  // namespace sample_attention

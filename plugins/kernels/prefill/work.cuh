// What one thread block of the prefill kernels works on: its (batch, head, tile), the real keys, and its list of keys.
#pragma once

#include "../common/real_keys.cuh"
#include "attend_params.h"

#include <cuda_runtime_api.h>

namespace sample_attention::attend_detail {

constexpr int kNoKey = 0x3fffffff;  // start of a list entry that does not exist: above every position, and outside the tensors

__device__ __forceinline__ Span real_keys(const AttendWork &p, int batch) { return sample_attention::real_keys(p.bounds, batch, p.keys); }

// Work item number -> (batch, head, tile). Items of one key/value head are neighbours, so that running blocks share its keys in L2.
__device__ __forceinline__ void decode_item(const AttendWork &p, int item, int &batch, int &head, int &tile) {
  if (p.order != nullptr) {
    int code = p.order[item];
    tile = p.first_tile + code % p.tiles;
    int row = code / p.tiles;
    head = row % p.heads;
    batch = row / p.heads;
    return;
  }
  int group = p.heads / p.kv_heads;
  int per_kv = group * p.tiles;
  int kv = item / per_kv, rest = item % per_kv;
  tile = p.first_tile + p.tiles - 1 - rest / group;
  head = (kv % p.kv_heads) * group + rest % group;
  batch = kv / p.kv_heads;
}

// The list entries ("units" of 1 << unit_log2 keys) of one work item.
struct Units {
  const int32_t *indices;  // null: consecutive from first
  int first, count;

  __device__ __forceinline__ Units(const AttendWork &p, const Span &real, int batch, int head, int tile) {
    if (p.counts != nullptr) {
      int64_t row = (int64_t(batch) * p.heads + head) * p.list_tiles + (tile - p.first_tile) / p.tiles_per_list;
      indices = p.indices + row * p.capacity;
      count = p.counts[row] << (p.block_log2 - p.unit_log2);
      first = 0;
    } else {
      int last_row = min((tile + 1) * kAttendRows, p.queries) - 1;
      int end = min(p.keys - p.queries + last_row + 1, real.last);
      indices = nullptr;
      first = real.first >> p.unit_log2;
      count = max(((end + (1 << p.unit_log2) - 1) >> p.unit_log2) - first, 0);
    }
  }

  __device__ __forceinline__ int start(const AttendWork &p, int u) const {
    if (u >= count) return kNoKey;
    if (indices == nullptr) return (first + u) << p.unit_log2;
    int split = p.block_log2 - p.unit_log2;
    return (indices[u >> split] << p.block_log2) + ((u & ((1 << split) - 1)) << p.unit_log2);
  }
};

}  // namespace sample_attention::attend_detail

// Arguments of the split-key decode kernel.
#pragma once

#include <cstdint>

namespace sample_attention {

struct DecodeParams {
  const void *query;   // [B, Hq, S, D]
  const void *key;     // [B, Hkv, T, D]
  const void *value;   // [B, Hkv, T, D]
  void *output;        // [B, Hq, S, D]
  float *lse;          // [B, Hq, S], or null
  float *partial;      // [splits, B, Hq, S, D], each normalised by its own sum
  float *partial_lse;  // [splits, B, Hq, S], base 2
  const int32_t *bounds;
  int64_t query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s, output_b, output_h, output_s;  // strides in elements
  int32_t batch, heads, kv_heads, queries, keys, splits;
  int32_t early;  // 1: the join may become resident before the ranges are done (compute capability 9.0 and newer)
  float scale, softcap;
};

}  // namespace sample_attention

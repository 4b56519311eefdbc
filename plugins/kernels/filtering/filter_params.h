// Arguments of the selection and of the work order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sample_attention {

struct FilterParams {
  const float *mass;      // [B, Hq, tiles, blocks]
  const float *alpha;     // [Hq], or null
  const int32_t *bounds;  // [B, 2], or null
  int32_t *counts;        // [B, Hq, tiles]
  int32_t *indices;       // [B, Hq, tiles, blocks]
  float alpha_all;
  float max_density;  // 1: no budget
  int32_t batch, heads, queries, keys;
  int32_t first_tile, tiles, blocks;
  int32_t block_q, block_k, window, sink, dense_rows;
  const int32_t *only;  // [B]: the batch items to work on are those with a non-zero entry; null: all
};

// Kept blocks of each (batch, head, query tile): docs/op.md, "Selection", steps 3 to 6. Takes blocks * 4 bytes of shared memory a thread block
// above 2048 blocks. early: compute capability 9.0 and newer; the kernel may start before the one in front of it has finished, and waits for it.
cudaError_t launch_filter(const FilterParams &params, cudaStream_t stream, bool early = false);

struct OrderParams {
  const int32_t *counts;  // [B, Hq, list_tiles]
  int32_t *order;         // [B * Hq * tiles]
  int32_t batch, heads, kv_heads, list_tiles, tiles, tiles_per_list, capacity;
  int32_t *ticket;  // of the prefill kernel, set to zero; or null
};

// Work items of the prefill kernel, longest first inside each key/value head.
cudaError_t launch_order(const OrderParams &params, cudaStream_t stream, bool early = false);

}  // namespace sample_attention

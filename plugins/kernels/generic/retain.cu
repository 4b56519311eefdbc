// The certificate's rows: the sampled probability that each sampled row keeps inside its tile's blocks. One more pass over the kept blocks.
#include "samples.cuh"

namespace sample_attention::generic {
namespace {

__global__ void __launch_bounds__(kThreads, 2) retain_kernel(const RetainParams p) {
  __shared__ Tile tile;
  __shared__ Rows rows;
  __shared__ int keys[kTile];
  __shared__ float retained[kTile];
  const Inputs &in = p.in;
  if (nothing_to_do(in)) return;
  const Samples &s = p.sample;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const int block_keys = s.block_k / s.classes;
  const int64_t items = int64_t(in.batch) * in.heads * p.tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int t = static_cast<int>(item % p.tiles);
    const int head = static_cast<int>(item / p.tiles % in.heads), batch = static_cast<int>(item / p.tiles / in.heads);
    if ((in.only != nullptr && in.only[batch] == 0) || is_full_head(s, head)) continue;
    const int64_t at = int64_t(batch) * in.heads + head;
    const int32_t *indices = p.indices + (at * p.tiles + t) * p.blocks;
    const int64_t listed = int64_t(p.counts[at * p.tiles + t]) * block_keys;
    const Real real(in, batch);
    const int64_t key_base = batch * in.key.b + int64_t(head / (in.heads / in.kv_heads)) * in.key.h;
    const int first_row = (p.first_tile + t) * s.block_q;
    // The rows of one class inside the tile, 64 at a time: neighbours in a class are row_step rows apart.
    const int row_step = s.policy == SA_RESIDUE ? s.classes : s.policy == SA_TILE ? s.row_step : 1;
    float low = 1.f, sum = 0.f;
    int sampled = 0;
    for (int cls = 0; cls < s.classes; ++cls) {
      const float *lse = s.lse + (at * s.classes + cls) * s.slots;
      for (int base = 0; base < s.block_q; base += kTile * row_step) {
        __syncthreads();
        if (threadIdx.x < kTile) {
          int row = first_row + base + threadIdx.x * row_step;
          if (s.policy == SA_RESIDUE) row += (cls - (in.keys - in.queries) - first_row) & (s.classes - 1);
          // Rows of `tile` are counted back from the last row of the tile.
          if (s.policy == SA_TILE) row = min(first_row + s.block_q, in.queries) - 1 - base - threadIdx.x * row_step;
          const bool inside = row >= first_row && row < min(first_row + s.block_q, in.queries);
          const int slot = inside ? slot_of(s, in, cls, t, row) : -1;
          const int position = row + in.keys - in.queries;
          const float row_lse = slot >= 0 && real.has(position) ? lse[slot] : kInfinity;
          const bool has_sample = row_lse != kInfinity;
          rows.position[threadIdx.x] = has_sample ? position : -1;
          rows.lse[threadIdx.x] = row_lse;
          tile.query_at[threadIdx.x] = has_sample ? batch * in.query.b + head * in.query.h + row * in.query.s : -1;
        }
        __syncthreads();
        int last = -1;
        for (int r = 0; r < kTile; ++r) last = max(last, rows.position[r]);

        float kept[4] = {0.f, 0.f, 0.f, 0.f};
        for (int64_t n = 0; n < listed && last >= 0; n += kTile) {
          __syncthreads();
          if (threadIdx.x < kTile) {
            const int64_t entry = n + threadIdx.x;
            const int64_t j = entry < listed ? int64_t(indices[entry / block_keys]) * s.block_k + first_key(s, cls) + entry % block_keys * s.classes : in.keys;
            const bool inside = j < in.keys && real.has(static_cast<int>(j));
            keys[threadIdx.x] = inside ? static_cast<int>(j) : in.keys;
            tile.key_at[threadIdx.x] = inside ? key_base + j * in.key.s : -1;
          }
          const Scores scores = score<false>(tile, in);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              if (keys[4 * x + c] <= rows.position[4 * y + r]) kept[r] += expf(scores.at[r][c] - rows.lse[4 * y + r]);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          kept[r] = row_sum(kept[r]);
          if (x == 0) retained[4 * y + r] = kept[r] > 1.f ? 1.f : kept[r];  // rounding; NaN stays
        }
        __syncthreads();
        if (threadIdx.x == 0) {
          for (int r = 0; r < kTile; ++r) {
            if (rows.position[r] < 0) continue;
            low = retained[r] >= low ? low : retained[r];
            sum += retained[r];
            ++sampled;
          }
        }
      }
    }
    if (threadIdx.x == 0) p.retained[at * p.all_tiles + p.first_tile + t] = {low, sum, sampled};
  }
}

}  // namespace

cudaError_t launch_retain(const RetainParams &p, int multiprocessors, cudaStream_t stream) {
  const int64_t items = int64_t(p.in.batch) * p.in.heads * p.tiles;
  return launch(retain_kernel, dim3(grid_of(items, p.in.only, multiprocessors)), kThreads, 0, stream, p);
}

}  // namespace sample_attention::generic

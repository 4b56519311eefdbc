// Selection for whole heads (column_slash, stripe_window): which columns and distance classes stay, then the block list of each query tile.
#include "generic_params.h"

#include "../common/launch.cuh"
#include "../common/real_keys.cuh"

#include <cmath>
#include <cstdint>

namespace sample_attention::generic {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Over the thread block, formed in one fixed order.
__device__ __forceinline__ float block_sum(float v, float *scratch) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += scratch[w];
  return total;
}

// The smallest set of masses that reaches alpha of their sum, ties to the lower index, by bisection on the bit pattern of the mass: the sum of the masses at or
// above a candidate is always formed in the same order, so it falls monotonically with the candidate.
__global__ void __launch_bounds__(kThreads) pick_kernel(const PickParams p) {
  __shared__ float scratch[kWarps];
  __shared__ int votes[kWarps];
  const int row = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  if (p.only != nullptr && p.only[batch] == 0) return;
  const int64_t at = (int64_t(batch) * p.heads + head) * p.rows + row;
  const float *mass = p.mass + at * p.blocks;
  uint8_t *keep = p.keep + at * p.blocks;
  const float columns = p.alpha != nullptr ? p.alpha[head] : p.alpha_all;
  const float slashes = p.rows == 1 ? 0.f : p.alpha_slash != nullptr ? p.alpha_slash[head] : p.alpha_slash_all;
  const float alpha = row == 0 ? columns : slashes;

  auto sum_from = [&](float least, bool above) {
    float sum = 0.f;
    for (int k = threadIdx.x; k < p.blocks; k += kThreads) {
      const float m = mass[k];
      sum += (above ? m > least : m >= least) ? m : 0.f;
    }
    return block_sum(sum, scratch);
  };

  // The masses of a head that is full attention were never written.
  bool all = columns >= 1.f || slashes >= 1.f;
  float total = 0.f;
  if (!all) {
    for (int k = threadIdx.x; k < p.blocks; k += kThreads) total += mass[k];
    total = block_sum(total, scratch);
    all = !(total > 0.f) || isinf(total);
  }
  if (threadIdx.x == 0) p.all[at] = all;
  if (all) return;
  const float need = alpha * total;
  uint32_t low = 1, high = 0x7f800000u;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (sum_from(__uint_as_float(middle), false) >= need)
      low = middle;
    else
      high = middle;
  }
  const float threshold = __uint_as_float(low);
  const float above = sum_from(threshold, true);
  const int ties = max(1, static_cast<int>(fminf(ceilf((need - above) / threshold), 2e9f)));
  int tied = 0;
  for (int base = 0; base < p.blocks; base += kThreads) {
    const int k = base + threadIdx.x;
    const float m = k < p.blocks ? mass[k] : 0.f;
    const bool tie = m == threshold;
    const unsigned lanes = __ballot_sync(~0u, tie);
    __syncthreads();
    if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = __popc(lanes);
    __syncthreads();
    int rank = tied + __popc(lanes & ((1u << threadIdx.x % 32) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < static_cast<int>(threadIdx.x) / 32) rank += votes[w];
      tied += votes[w];
    }
    if (k < p.blocks) keep[k] = m > threshold || (tie && rank < ties);
  }
}

constexpr int kTilesABlock = 4;

// One warp a query tile: docs/op.md, "Selection", steps 3 to 6.
__global__ void __launch_bounds__(32 * kTilesABlock) expand_kernel(const ExpandParams p) {
  const int lane = threadIdx.x % 32;
  const int t = blockIdx.x * kTilesABlock + threadIdx.x / 32, head = blockIdx.y, batch = blockIdx.z;
  if (t >= p.tiles || (p.only != nullptr && p.only[batch] == 0)) return;
  const int64_t at = int64_t(batch) * p.heads + head;
  const uint8_t *columns = p.keep + at * p.rows * p.blocks;
  const uint8_t *slashes = p.rows == 2 ? columns + p.blocks : nullptr;

  const int first_row = (p.first_tile + t) * p.block_q;
  const int first = p.keys - p.queries + first_row;
  const int last = p.keys - p.queries + min(first_row + p.block_q, p.queries) - 1;
  const int blocks = last / p.block_k + 1;
  const Span real = real_keys(p.bounds, batch, p.keys);
  const int near_first = max(first - p.window, 0) / p.block_k;
  const int sink_first = real.first / p.block_k, sink_last = p.sink > 0 ? (real.first + p.sink - 1) / p.block_k : -1;
  bool all = p.all[at * p.rows] != 0 || (p.rows == 2 && p.all[at * p.rows + 1] != 0);
  all = all || meets_dense_rows(real, first, last, p.dense_rows);

  int32_t *indices = p.indices + (at * p.tiles + t) * p.blocks;
  int written = 0;
  for (int base = 0; base < blocks; base += 32) {
    const int k = base + lane;
    bool keep = k < blocks && (all || k >= near_first || (k >= sink_first && k <= sink_last));
    if (k < blocks && !keep) {
      keep = columns[k] != 0;
      if (slashes != nullptr && !keep) {
        // The distances between a tile and a block are all the integers from nearest to farthest.
        const int nearest = max(first - min((k + 1) * p.block_k, p.keys) + 1, 0) / p.block_k, farthest = (last - k * p.block_k) / p.block_k;
        for (int u = nearest; u <= farthest && !keep; ++u) keep = slashes[u] != 0;
      }
    }
    const unsigned lanes = __ballot_sync(~0u, keep);
    if (keep) indices[written + __popc(lanes & ((1u << lane) - 1))] = k;
    written += __popc(lanes);
  }
  if (lane == 0) p.counts[at * p.tiles + t] = written;
}

}  // namespace

cudaError_t launch_pick(const PickParams &p, cudaStream_t stream) { return launch(pick_kernel, dim3(p.rows, p.heads, p.batch), kThreads, 0, stream, p); }

cudaError_t launch_expand(const ExpandParams &p, cudaStream_t stream) {
  return launch(expand_kernel, dim3((p.tiles + kTilesABlock - 1) / kTilesABlock, p.heads, p.batch), 32 * kTilesABlock, 0, stream, p);
}

}  // namespace sample_attention::generic

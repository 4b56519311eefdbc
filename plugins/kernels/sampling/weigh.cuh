// Weights of the keys for the block masses: L2 norms of the value rows, zeros for keys that are not real, in the order of the key slices (key j is element j >>
// key_log2 of slice j mod stride). Bound by reading V once. Eight lanes share a row, 16 bytes a lane and step.
#pragma once

#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "sample_params.h"

#include <cute/numeric/numeric_types.hpp>

#include <cstring>

namespace sample_attention {

constexpr int kWeighThreads = 256;

// Build: a type that keeps the kernels of sources for different architectures apart.
template <class Element, int kHeadDim, class Build>
__global__ void __launch_bounds__(kWeighThreads) weigh_kernel(const WeightParams p) {
  const int j = blockIdx.x * (kWeighThreads / 8) + threadIdx.x / 8, lane = threadIdx.x % 8;
  const int kv_head = blockIdx.y, batch = blockIdx.z;
  ptx::launch_dependents();
  if (blockIdx.x == 0 && kv_head == 0 && batch == 0 && threadIdx.x < p.ticket_count) p.tickets[threadIdx.x] = 0;
  const int first = p.bounds != nullptr ? max(p.bounds[2 * batch], 0) : 0, last = p.bounds != nullptr ? min(p.bounds[2 * batch + 1], p.keys) : p.keys;
  const bool real = j >= first && j < last;
  float sum = 0.f;
  if (real && p.by_value) {
    const Element *row = static_cast<const Element *>(p.value) + batch * p.value_b + kv_head * p.value_h + j * p.value_s;
#pragma unroll
    for (int c = 0; c < kHeadDim; c += 64) {
      if (c + lane * 8 < kHeadDim) {
        uint4 word = *reinterpret_cast<const uint4 *>(row + c + lane * 8);
        Element values[8];
        memcpy(values, &word, sizeof(word));
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(float(values[e]), float(values[e]), sum);
      }
    }
  }
#pragma unroll
  for (int d = 1; d < 8; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const int slices_log2 = p.key_log2;
  if (lane == 0 && j < p.weight_row << slices_log2) {
    int64_t slice = ((int64_t(batch) * p.kv_heads + kv_head) << slices_log2) + (j & ((1 << slices_log2) - 1));
    p.weight[slice * p.weight_row + (j >> slices_log2)] = !real ? 0.f : p.by_value ? sqrtf(sum) : 1.f;
  }
}

template <class Element, int kHeadDim, class Build = Element>
cudaError_t launch_weigh(const WeightParams &p, cudaStream_t stream) {
  const int rows = p.weight_row << p.key_log2;
  return launch(weigh_kernel<Element, kHeadDim, Build>, dim3((rows + kWeighThreads / 8 - 1) / (kWeighThreads / 8), p.kv_heads, p.batch), kWeighThreads, 0,
                stream, p);
}

}  // namespace sample_attention

#include "prepare_params.h"

#include "../common/launch.cuh"

#include <cmath>
#include <cstring>

namespace sample_attention {
namespace {

constexpr int kSpanThreads = 1024;

struct Span {
  int first, end, count;
};

__device__ __forceinline__ Span join(const Span &a, const Span &b) { return {min(a.first, b.first), max(a.end, b.end), a.count + b.count}; }

__device__ __forceinline__ Span across_warp(Span s) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) s = join(s, {__shfl_xor_sync(~0u, s.first, d), __shfl_xor_sync(~0u, s.end, d), __shfl_xor_sync(~0u, s.count, d)});
  return s;
}

// One thread block a batch item, 16 bytes a thread and step where the row is aligned.
__global__ void __launch_bounds__(kSpanThreads) span_kernel(const SpanParams p) {
  __shared__ Span warps[32];
  const int batch = blockIdx.x;
  const uint8_t *row = p.key_mask + int64_t(batch) * p.keys;
  Span s{p.keys, 0, 0};
  auto see = [&](int j, bool real) {
    if (real) s = join(s, {j, j + 1, 1});
  };
  const int words = reinterpret_cast<uintptr_t>(row) % 16 == 0 ? p.keys / 16 : 0;
  for (int w = threadIdx.x; w < words; w += kSpanThreads) {
    const uint4 word = reinterpret_cast<const uint4 *>(row)[w];
    const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int e = 0; e < 16; ++e) see(16 * w + e, (parts[e / 4] >> (8 * (e % 4)) & 0xffu) != 0);
  }
  for (int j = 16 * words + threadIdx.x; j < p.keys; j += kSpanThreads) see(j, row[j] != 0);
  s = across_warp(s);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  s = across_warp(warps[threadIdx.x]);
  if (threadIdx.x != 0) return;
  const bool holes = s.count > 0 && s.count != s.end - s.first;
  p.bounds[2 * batch] = s.first;
  p.bounds[2 * batch + 1] = s.end;
  p.fast_bounds[2 * batch] = holes ? p.keys : s.first;
  p.fast_bounds[2 * batch + 1] = holes ? 0 : s.end;
  p.holes[batch] = holes;
}

constexpr int kValues = 256;

struct StoreParams {
  float values[kValues];
  float *target;
  int32_t count;
};

__global__ void __launch_bounds__(kValues) store_kernel(const StoreParams p) {
  if (static_cast<int>(threadIdx.x) < p.count) p.target[threadIdx.x] = p.values[threadIdx.x];
}

// One warp a head.
__global__ void __launch_bounds__(32) certificate_kernel(const CertificateParams p) {
  const int head = blockIdx.x, batch = blockIdx.y;
  const float alpha = p.alpha != nullptr ? p.alpha[head] : p.alpha_all;
  const float slash = p.alpha_slash != nullptr ? p.alpha_slash[head] : p.alpha_slash_all;
  const int64_t at = int64_t(batch) * p.heads + head;
  float low = 1.f;
  double sum = 0.0;
  int rows = 0;
  if (p.rows != nullptr && alpha < 1.f && slash < 1.f) {
    for (int t = threadIdx.x; t < p.tiles; t += 32) {
      const Retained r = p.rows[at * p.tiles + t];
      if (r.rows == 0) continue;
      // Written so that NaN is kept.
      low = r.low >= low ? low : r.low;
      sum += r.sum;
      rows += r.rows;
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(~0u, low, d);
    low = other >= low ? low : other;
    sum += __shfl_xor_sync(~0u, sum, d);
    rows += __shfl_xor_sync(~0u, rows, d);
  }
  if (threadIdx.x != 0) return;
  p.certificate[2 * at] = rows > 0 ? low : 1.f;
  p.certificate[2 * at + 1] = rows > 0 ? static_cast<float>(sum / rows) : 1.f;
}

}  // namespace

cudaError_t launch_span(const SpanParams &params, cudaStream_t stream) { return launch(span_kernel, dim3(params.batch), kSpanThreads, 0, stream, params); }

cudaError_t store_floats(const float *host, int count, float *device, cudaStream_t stream) {
  for (int first = 0; first < count; first += kValues) {
    StoreParams p{};
    p.count = count - first < kValues ? count - first : kValues;
    p.target = device + first;
    std::memcpy(p.values, host + first, p.count * sizeof(float));
    cudaError_t error = launch(store_kernel, dim3(1), kValues, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_certificate(const CertificateParams &params, cudaStream_t stream) {
  return launch(certificate_kernel, dim3(params.heads, params.batch), 32, 0, stream, params);
}

}  // namespace sample_attention

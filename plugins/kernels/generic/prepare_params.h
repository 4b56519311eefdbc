// Small work around a call: the span of a mask, thresholds from the host, the certificate from its rows.
#pragma once

#include "../common/retained.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sample_attention {

struct SpanParams {
  const uint8_t *key_mask;  // [B, T]
  int32_t *bounds;          // [B, 2] first real key, one past the last; (T, 0) without one
  int32_t *fast_bounds;     // [B, 2] the same, and (T, 0) for a mask with holes
  int32_t *holes;           // [B] 1 where a key between them is not real
  int32_t batch, keys;
};

cudaError_t launch_span(const SpanParams &params, cudaStream_t stream);

// Writes host values to device memory through kernel arguments: no copy engine, no pinned memory, and a captured graph keeps them.
cudaError_t store_floats(const float *host, int count, float *device, cudaStream_t stream);

struct CertificateParams {
  const Retained *rows;      // [B, Hq, nQ]; null: every head is full attention
  const float *alpha;        // [Hq], or null
  const float *alpha_slash;  // [Hq], or null
  float *certificate;        // [B, Hq, 2]
  float alpha_all, alpha_slash_all;
  int32_t batch, heads, tiles;
};

cudaError_t launch_certificate(const CertificateParams &params, cudaStream_t stream);

}  // namespace sample_attention

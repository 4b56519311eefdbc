// The keys of a batch item that are not padding, and the query tiles that keep every block for being among the last of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sample_attention {

struct Span {
  int first, last;  // real keys of a batch item: first .. last - 1
};

// bounds: [B, 2], or null: all keys are real. What a caller's bounds have outside the keys does not count.
__device__ __forceinline__ Span real_keys(const int32_t *bounds, int batch, int keys) {
  if (bounds == nullptr) return {0, keys};
  return {max(bounds[2 * batch], 0), min(bounds[2 * batch + 1], keys)};
}

// Whether rows at the positions first .. last meet the last dense_rows real ones (docs/op.md, "Selection", 5).
__device__ __forceinline__ bool meets_dense_rows(const Span &real, int first, int last, int dense_rows) {
  return dense_rows > 0 && last >= real.last - dense_rows && first < real.last;
}

}  // namespace sample_attention

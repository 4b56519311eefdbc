// The workspace of a call. Its size depends on the problem alone, and does not fall when batch, queries or keys grow.
#pragma once

#include "path.h"

#include <cstdint>

namespace sample_attention {

struct Frame {
  int chunk = 0;  // query tiles of one pass over sample, filter and attend; 0 where nothing is selected

  int32_t *bounds = nullptr;       // [B, 2] span of the real keys
  int32_t *fast_bounds = nullptr;  // [B, 2] the same, and (T, 0) for a mask with holes
  int32_t *holes = nullptr;        // [B] whether the mask has holes
  float *alpha = nullptr;          // [Hq]
  float *alpha_slash = nullptr;    // [Hq]
  Retained *retained = nullptr;    // [B, Hq, nQ]
  // Spaces of the paths. With a mask the generic kernels may follow others in the same call, so theirs are apart.
  void *select = nullptr, *generic_select = nullptr;
  void *attend = nullptr, *generic_attend = nullptr;
  void *decode = nullptr, *generic_decode = nullptr;
  float *mass = nullptr;       // [B, Hq, mass_rows(chunk), nK]
  int32_t *counts = nullptr;   // [B, Hq, chunk]
  int32_t *indices = nullptr;  // [B, Hq, chunk, nK]
  int64_t bytes = 0;

  Frame(const sa_problem &problem, void *base);
};

}  // namespace sample_attention

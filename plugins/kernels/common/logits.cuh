// From raw dot products to exponents of two: scale, soft-cap, and the guards for rows without keys.
#pragma once

#include "ptx.cuh"

#include <cmath>

namespace sample_attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Scores leave the tensor cores as q.k. Without a soft-cap the exponent is q.k * multiplier; with one, cap() first maps q.k to
// tanh(q.k * scale / softcap), and multiplier carries softcap * log2(e).
struct LogitScale {
  float multiplier;
  float inner;  // scale / softcap, or 0

  __host__ __device__ LogitScale(float scale, float softcap)
      : multiplier((softcap > 0 ? softcap : scale) * kLog2e), inner(softcap > 0 ? scale / softcap : 0.f) {}

  __device__ __forceinline__ bool capped() const { return inner > 0.f; }

  // tanh(x) = 1 - 2 / (1 + e^2x): absolute error near 1e-7, which tanh.approx (2^-11, relative) would not give. Both ends saturate.
  __device__ __forceinline__ float cap(float dot) const {
    float e = ptx::exp2_fast(dot * inner * (2.f * kLog2e));
    return 1.f - __fdividef(2.f, 1.f + e);
  }
};

// __fdividef gives 0 for a divisor in (2^126, 2^128) and 2 / inf = 0, so cap() reaches exactly 1 there.

}  // namespace sample_attention

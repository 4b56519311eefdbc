#include "contract.h"

#include "status.h"

#include <algorithm>
#include <cmath>

namespace sample_attention {
namespace {

bool power_of_two(int v) { return v > 0 && (v & (v - 1)) == 0; }

bool threshold(float alpha) { return alpha > 0.f && alpha <= 1.f; }

Status check_shape(const sa_problem &p) {
  if (p.dtype < SA_FLOAT16 || p.dtype > SA_FLOAT32)
    return fail(SA_UNSUPPORTED, "dtype code %d is not built; allowed: 0 (float16), 1 (bfloat16), 2 (float32).", p.dtype);
  if (p.batch < 1 || p.heads < 1 || p.kv_heads < 1 || p.queries < 1 || p.keys < 1)
    return fail(SA_INVALID, "batch %d, heads %d, kv_heads %d, queries %d, keys %d: every one must be at least 1.", p.batch, p.heads, p.kv_heads, p.queries,
                p.keys);
  if (p.heads % p.kv_heads != 0)
    return fail(SA_INVALID, "heads is %d, which is not a multiple of kv_heads %d; give each key/value head the same number of query heads.", p.heads,
                p.kv_heads);
  if (p.queries > p.keys)
    return fail(SA_INVALID, "queries is %d and keys is %d; allowed: queries <= keys, because query row i stands at position keys - queries + i.", p.queries,
                p.keys);
  if (p.keys > kMaxKeys) return fail(SA_UNSUPPORTED, "keys is %d; allowed: at most %d.", p.keys, kMaxKeys);
  if (p.batch > 65535 || p.heads > 65535) return fail(SA_UNSUPPORTED, "batch %d and heads %d: each may be at most 65535.", p.batch, p.heads);
  if (p.head_dim < 1 || p.head_dim > kMaxHeadDim || p.value_dim < 1 || p.value_dim > kMaxHeadDim)
    return fail(SA_UNSUPPORTED, "head_dim is %d and value_dim %d; allowed: 1 to %d each.", p.head_dim, p.value_dim, kMaxHeadDim);
  if (!(p.scale > 0.f) || !std::isfinite(p.scale)) return fail(SA_INVALID, "scale is %g; allowed: finite and above 0.", p.scale);
  if (!(p.softcap >= 0.f) || !std::isfinite(p.softcap)) return fail(SA_INVALID, "softcap is %g; allowed: 0 (none) or a finite value above 0.", p.softcap);
  if ((p.has_key_mask | p.has_certificate) & ~1)
    return fail(SA_INVALID, "has_key_mask is %d and has_certificate %d; allowed: 0 or 1.", p.has_key_mask, p.has_certificate);
  return {};
}

Status check_policy(const sa_problem &p) {
  if (p.policy < SA_DENSE || p.policy > SA_STRIPE_WINDOW)
    return fail(SA_INVALID, "policy code %d is unknown; allowed: 0 dense, 1 residue, 2 tile, 3 column_slash, 4 stripe_window.", p.policy);
  if (!power_of_two(p.block_k) || p.block_k < 16 || p.block_k > 256)
    return fail(SA_INVALID, "block_k is %d; allowed: a power of two from 16 to 256.", p.block_k);
  if (!power_of_two(p.block_q) || p.block_q < 16 || p.block_q > 256)
    return fail(SA_INVALID, "block_q is %d; allowed: a power of two from 16 to 256.", p.block_q);
  if (p.policy == SA_DENSE) return {};
  if (!threshold(p.alpha)) return fail(SA_INVALID, "alpha is %g; allowed: above 0, at most 1.", p.alpha);
  if (!(p.max_density > 0.f && p.max_density <= 1.f)) return fail(SA_INVALID, "max_density is %g; allowed: above 0, at most 1.", p.max_density);
  if (p.max_density < 1.f && per_head(p))
    return fail(SA_INVALID, "max_density is %g with policy %s, which selects for whole heads; allowed: 1 (residue and tile take a budget).", p.max_density,
                p.policy == SA_COLUMN_SLASH ? "column_slash" : "stripe_window");
  if (p.window < 0 || p.sink < 0 || p.dense_rows < 0 || p.min_length < 0)
    return fail(SA_INVALID, "window %d, sink %d, dense_rows %d, min_length %d: none may be negative.", p.window, p.sink, p.dense_rows, p.min_length);
  if (p.value_weight != 0 && p.value_weight != 1) return fail(SA_INVALID, "value_weight is %d; allowed: 0 or 1.", p.value_weight);
  switch (p.policy) {
    case SA_RESIDUE:
      if (!power_of_two(p.stride) || p.stride > p.block_q || p.stride > p.block_k)
        return fail(SA_INVALID, "stride is %d; it must be a power of two that divides block_q %d and block_k %d.", p.stride, p.block_q, p.block_k);
      break;
    case SA_TILE:
      if (!power_of_two(p.sample_rows) || p.sample_rows > p.block_q)
        return fail(SA_INVALID, "sample_rows is %d; it must be a power of two that divides block_q %d.", p.sample_rows, p.block_q);
      break;
    case SA_COLUMN_SLASH:
      if (p.segment < 1 || p.sample_rows < 1 || p.sample_rows > p.segment)
        return fail(SA_INVALID, "sample_rows is %d and segment %d; allowed: 1 <= sample_rows <= segment.", p.sample_rows, p.segment);
      if (!threshold(p.alpha_slash)) return fail(SA_INVALID, "alpha_slash is %g; allowed: above 0, at most 1.", p.alpha_slash);
      break;
    default:
      if (!(p.sample_ratio > 0.f && p.sample_ratio <= 1.f)) return fail(SA_INVALID, "sample_ratio is %g; allowed: above 0, at most 1.", p.sample_ratio);
      if (!(p.window_ratio >= 0.f && p.window_ratio <= 1.f)) return fail(SA_INVALID, "window_ratio is %g; allowed: 0 to 1.", p.window_ratio);
  }
  return {};
}

}  // namespace

int forced_window(const sa_problem &p) {
  if (p.policy != SA_STRIPE_WINDOW) return p.window;
  volatile float product = p.window_ratio * static_cast<float>(p.keys);  // rounded to float32, as the specification says
  return std::max(p.window, static_cast<int>(std::ceil(product)));
}

Status check_contract(const sa_problem &p) {
  Status status = check_shape(p);
  return status.ok() ? check_policy(p) : status;
}

bool is_full(const sa_problem &p) {
  return p.policy == SA_DENSE || p.alpha >= 1.f || (p.policy == SA_COLUMN_SLASH && p.alpha_slash >= 1.f) || p.keys < p.min_length || p.queries <= kDecodeRows;
}

int32_t mass_rows(const sa_problem &p, int32_t tiles) {
  return p.policy == SA_DENSE ? 0 : p.policy == SA_COLUMN_SLASH ? 2 : p.policy == SA_STRIPE_WINDOW ? 1 : tiles;
}

}  // namespace sample_attention

// What is built, in sentences: what was got, what is allowed, what to do.
#include "built.h"
#include "plan.h"
#include "status.h"

#include <cmath>
#include <cstring>

namespace sample_attention {
namespace {

bool power_of_two(int v) { return v > 0 && (v & (v - 1)) == 0; }

bool head_dim_built(int head_dim) {
#define SA_CASE(D) \
  if (head_dim == D) return true;
  SA_FOR_EACH_HEAD_DIM(SA_CASE)
#undef SA_CASE
  return false;
}

Status check_shape(const sa_problem &p) {
  if (p.dtype != SA_FLOAT16 && p.dtype != SA_BFLOAT16)
    return fail(SA_UNSUPPORTED, "dtype code %d is not built; allowed: 0 (float16), 1 (bfloat16). Cast the inputs, or run the function body.", p.dtype);
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
  if (int64_t(p.batch) > 65535 || p.heads > 65535) return fail(SA_UNSUPPORTED, "batch %d and heads %d: each may be at most 65535.", p.batch, p.heads);
  if (!head_dim_built(p.head_dim))
    return fail(SA_UNSUPPORTED, "head_dim %d is not built (built: " SA_HEAD_DIMS_TEXT "); rebuild with -DSA_HEAD_DIMS, or leave the layer dense.", p.head_dim);
  if (!(p.scale > 0.f) || !std::isfinite(p.scale)) return fail(SA_INVALID, "scale is %g; allowed: finite and above 0.", p.scale);
  if (!(p.softcap >= 0.f) || !std::isfinite(p.softcap)) return fail(SA_INVALID, "softcap is %g; allowed: 0 (none) or a finite value above 0.", p.softcap);
  return {};
}

Status check_policy(const sa_problem &p) {
  if (p.policy < SA_DENSE || p.policy > SA_STRIPE_WINDOW)
    return fail(SA_INVALID, "policy code %d is unknown; allowed: 0 dense, 1 residue, 2 tile, 3 column_slash, 4 stripe_window.", p.policy);
  if (p.policy == SA_COLUMN_SLASH || p.policy == SA_STRIPE_WINDOW)
    return fail(SA_UNSUPPORTED, "policy '%s' has no kernel; use 'residue' or 'tile', or run the function body.",
                p.policy == SA_COLUMN_SLASH ? "column_slash" : "stripe_window");
  if (!power_of_two(p.block_k) || p.block_k < 16 || p.block_k > 256)
    return fail(SA_INVALID, "block_k is %d; allowed: a power of two from 16 to 256.", p.block_k);
  if (!power_of_two(p.block_q) || p.block_q < 16 || p.block_q > 256)
    return fail(SA_INVALID, "block_q is %d; allowed: a power of two from 16 to 256.", p.block_q);
  if (p.policy == SA_DENSE) return {};
  if (p.block_q < kAttendRows) return fail(SA_UNSUPPORTED, "block_q is %d; the kernels are built for 128 and 256 rows a tile. Set block_q to 128.", p.block_q);
  if (!(p.alpha > 0.f && p.alpha <= 1.f)) return fail(SA_INVALID, "alpha is %g; allowed: above 0, at most 1.", p.alpha);
  if (p.window < 0 || p.sink < 0 || p.dense_rows < 0 || p.min_length < 0)
    return fail(SA_INVALID, "window %d, sink %d, dense_rows %d, min_length %d: none may be negative.", p.window, p.sink, p.dense_rows, p.min_length);
  if (p.value_weight != 0 && p.value_weight != 1) return fail(SA_INVALID, "value_weight is %d; allowed: 0 or 1.", p.value_weight);
  if (p.policy == SA_RESIDUE) {
    if (!power_of_two(p.stride) || p.stride > p.block_q || p.stride > p.block_k)
      return fail(SA_INVALID, "stride is %d; it must be a power of two that divides block_q %d and block_k %d.", p.stride, p.block_q, p.block_k);
    int rows = p.block_q / p.stride, keys = p.block_k / p.stride;
    if (rows < 4 || rows > 64 || keys < 2)
      return fail(SA_UNSUPPORTED,
                  "stride is %d with block_q %d and block_k %d; the kernels need 4 to 64 rows of a tile (block_q / stride) and at least 2 keys of a "
                  "block (block_k / stride) in a slice. With tiles of 128 x 64 use stride 2, 4, 8, 16 or 32.",
                  p.stride, p.block_q, p.block_k);
  } else {
    if (!power_of_two(p.sample_rows) || p.sample_rows > p.block_q)
      return fail(SA_INVALID, "sample_rows is %d; it must be a power of two that divides block_q %d.", p.sample_rows, p.block_q);
    if (p.sample_rows < 4 || p.sample_rows > 64)
      return fail(SA_UNSUPPORTED, "sample_rows is %d; the kernels are built for 4, 8, 16, 32 and 64 rows a tile.", p.sample_rows);
    if (p.block_k > 128) return fail(SA_UNSUPPORTED, "block_k is %d; policy 'tile' is built for blocks of at most 128 keys.", p.block_k);
  }
  int64_t blocks = (int64_t(p.keys) + p.block_k - 1) / p.block_k;
  if (blocks > kMaxBlocks)
    return fail(SA_UNSUPPORTED, "keys %d in blocks of %d make %lld blocks; at most %d fit the selection's shared memory. Use a larger block_k.", p.keys,
                p.block_k, static_cast<long long>(blocks), kMaxBlocks);
  return {};
}

}  // namespace

Status supports(const sa_problem &problem, int compute_capability) {
  if (compute_capability != 90)
    return fail(SA_UNSUPPORTED, "compute capability %d.%d is not built; the kernels are sm_90a code (H100, H200: 9.0). Run the function body on this device.",
                compute_capability / 10, compute_capability % 10);
  Status status = check_shape(problem);
  return status.ok() ? check_policy(problem) : status;
}

bool is_full(const sa_problem &p) { return p.policy == SA_DENSE || p.alpha >= 1.f || p.keys < p.min_length || p.queries <= kDecodeRows; }

}  // namespace sample_attention

// The operator's contract (docs/op.md) as far as the host needs it: what is allowed, and what is full attention.
#pragma once

#include "sample_attention/kernels.h"

#include <cstdint>

namespace sample_attention {

constexpr int kDecodeRows = 16;    // S up to this is full attention by specification
constexpr int kMaxKeys = 1 << 30;  // positions stay below the kernels' "no key" marker
constexpr int kMaxHeadDim = 256;
constexpr int64_t kDefaultScratch = int64_t(512) << 20;

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline int log2_of(int v) {
  int n = 0;
  while ((1 << n) < v) ++n;
  return n;
}

inline int query_tiles(const sa_problem &p) { return ceil_div(p.queries, p.block_q); }
inline int key_blocks(const sa_problem &p) { return ceil_div(p.keys, p.block_k); }

// One selection a (batch, head) instead of one a query tile.
inline bool per_head(const sa_problem &p) { return p.policy == SA_COLUMN_SLASH || p.policy == SA_STRIPE_WINDOW; }

// Forced window in tokens (docs/op.md, step 3).
int forced_window(const sa_problem &problem);

// SA_OK, or the first value outside the contract.
Status check_contract(const sa_problem &problem);

}  // namespace sample_attention

#include "plan.h"

#include <algorithm>

namespace sample_attention {
namespace {

int log2_of(int v) {
  int n = 0;
  while ((1 << n) < v) ++n;
  return n;
}

int ceil_div(int a, int b) { return static_cast<int>((int64_t(a) + b - 1) / b); }

// Enough key ranges to fill the chip twice at one key/value head, none shorter than 512 keys: a shorter one is dominated by its start-up.
int decode_splits(const sa_problem &p) {
  constexpr int kTargetBlocks = 264;
  int64_t heads = int64_t(p.batch) * p.kv_heads;
  int64_t wanted = (kTargetBlocks + heads - 1) / heads;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, ceil_div(p.keys, 512))));
}

}  // namespace

Plan::Plan(const sa_problem &p) {
  bool full = is_full(p);
  tiles_per_list = std::max(p.block_q / kAttendRows, 1);
  tiles = ceil_div(p.queries, tiles_per_list * kAttendRows);
  blocks = ceil_div(p.keys, p.block_k);
  classes = p.policy == SA_RESIDUE ? p.stride : 1;
  int row_stride = p.policy == SA_RESIDUE ? p.stride : p.policy == SA_TILE ? p.block_q / p.sample_rows : 1;
  row_log2 = log2_of(row_stride);
  key_log2 = p.policy == SA_RESIDUE ? row_log2 : 0;
  tile_rows_log2 = log2_of(p.block_q) - row_log2;
  block_keys_log2 = log2_of(p.block_k) - key_log2;
  splits = p.queries <= kDecodeRows ? decode_splits(p) : 0;
  chunk = 0;
  groups = 0;
  weight_row = 0;
  if (!full) {
    weight_row = ceil_div(ceil_div(p.keys, 1 << key_log2), 128) * 128;
    int group_tiles = kSampleRows >> tile_rows_log2;
    int64_t heads = int64_t(p.batch) * p.heads;
    int64_t tile_bytes = heads * (int64_t(blocks) * 8 + 4 + int64_t(p.block_q) * 4);
    int64_t fit = (p.scratch_bytes > 0 ? p.scratch_bytes : kDefaultScratch) / tile_bytes;
    fit = std::max<int64_t>(fit / group_tiles, 1) * group_tiles;
    chunk = static_cast<int>(std::min<int64_t>(fit, tiles));
    groups = ceil_div(chunk << tile_rows_log2, kSampleRows) + (p.policy == SA_TILE ? 1 : 0);
  }
}

Workspace::Workspace(const sa_problem &p, const Plan &plan, void *base) {
  int64_t heads = int64_t(p.batch) * p.heads;
  Carver carver(base);
  tickets = carver.take<int32_t>(kTickets);
  order = carver.take<int32_t>(heads * plan.tiles * plan.tiles_per_list);
  weight = carver.take<float>(int64_t(p.batch) * p.kv_heads * plan.weight_row << plan.key_log2);
  lse = carver.take<float>(heads * plan.classes * plan.groups * kSampleRows);
  mass = carver.take<float>(heads * plan.chunk * plan.blocks);
  counts = carver.take<int32_t>(heads * plan.chunk);
  indices = carver.take<int32_t>(heads * plan.chunk * plan.blocks);
  partial = carver.take<float>(heads * plan.splits * p.queries * p.head_dim);
  partial_lse = carver.take<float>(heads * plan.splits * p.queries);
  bytes = carver.used();
}

int64_t workspace_bytes(const sa_problem &problem) {
  if (!supports(problem, 90).ok()) return 0;
  return Workspace(problem, Plan(problem), nullptr).bytes;
}

int32_t chunk_tiles(const sa_problem &problem) { return supports(problem, 90).ok() ? Plan(problem).chunk : 0; }

}  // namespace sample_attention

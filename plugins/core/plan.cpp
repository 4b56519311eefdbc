#include "plan.h"

#include "contract.h"

#include <algorithm>

namespace sample_attention {
namespace {

constexpr int kTargetBlocks = 264;   // of decode: two for each multiprocessor, all that are resident at once
constexpr int kSmallestRange = 512;  // keys: a shorter range is dominated by its start-up

// At most as many thread blocks as are resident at once: a few more would have the chip to themselves in a second round. Where one for each head is more than
// that, at least four rounds, so that the last one is a small part. No range is shorter than the smallest.
int decode_splits(const sa_problem &p) {
  int64_t heads = int64_t(p.batch) * p.kv_heads;
  int64_t wanted = heads <= kTargetBlocks ? kTargetBlocks / heads : (4 * kTargetBlocks + heads - 1) / heads;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, ceil_div(p.keys, kSmallestRange))));
}

}  // namespace

Plan::Plan(const sa_problem &p) {
  const Slices slices(p);
  tiles_per_list = std::max(p.block_q / kAttendRows, 1);
  tiles = ceil_div(p.queries, tiles_per_list * kAttendRows);
  blocks = ceil_div(p.keys, p.block_k);
  classes = slices.classes;
  row_log2 = slices.row_log2;
  key_log2 = slices.key_log2;
  tile_rows_log2 = slices.tile_rows_log2;
  block_keys_log2 = slices.block_keys_log2;
  group_tiles = std::max(kSampleRows >> tile_rows_log2, 1);
  weight_row = ceil_div(ceil_div(p.keys, 1 << key_log2), 128) * 128;
  splits = p.queries <= kDecodeRows ? decode_splits(p) : 0;
}

namespace {

int64_t weights(const sa_problem &p, const Plan &plan) { return int64_t(p.batch) * p.kv_heads * plan.weight_row << plan.key_log2; }
bool own_ones(const sa_problem &p) { return p.has_certificate == 1 && p.value_weight == 1; }

}  // namespace

SelectSpace::SelectSpace(const sa_problem &p, const Plan &plan, int chunk, void *base) {
  Carver carver(base);
  const TableNeed need(p);
  tickets = carver.take<int32_t>(kTickets);
  weight = carver.take<float>(weights(p, plan));
  ones = own_ones(p) ? carver.take<float>(weights(p, plan)) : weight;
  table_bytes = need.fixed + chunk * need.tile;
  table = carver.take<char>(table_bytes);
}

AttendSpace::AttendSpace(const sa_problem &p, const Plan &plan, void *base) {
  Carver carver(base);
  tickets = carver.take<int32_t>(kTickets);
  order = carver.take<int32_t>(int64_t(p.batch) * p.heads * plan.tiles * plan.tiles_per_list);
}

DecodeSpace::DecodeSpace(const sa_problem &p, const Plan &plan, void *base) {
  Carver carver(base);
  int64_t rows = int64_t(p.batch) * p.heads * plan.splits * p.queries;
  partial = carver.take<float>(rows * p.head_dim);
  partial_lse = carver.take<float>(rows);
}

Need sm90_select_need(const sa_problem &p) {
  Plan plan(p);
  const TableNeed table(p);
  Need need;
  need.fixed = aligned(kTickets * 4) + aligned(weights(p, plan) * 4) * (own_ones(p) ? 2 : 1) + aligned(table.fixed) + kAlignment;
  need.tile = table.tile;
  need.granule = plan.group_tiles;
  return need;
}

int64_t sm90_attend_need(const sa_problem &p) {
  Plan plan(p);
  return aligned(kTickets * 4) + aligned(int64_t(p.batch) * p.heads * plan.tiles * plan.tiles_per_list * 4);
}

int64_t decode_need(const sa_problem &p) {
  // heads * splits, free of the division: (1056 + n - 1) / n ranges for n key/value heads are at most 1056 + n - 1 of them together.
  int64_t kv_heads = int64_t(p.batch) * p.kv_heads, group = p.heads / p.kv_heads;
  int64_t ranges = std::min<int64_t>(kv_heads <= kTargetBlocks ? kTargetBlocks : 4 * kTargetBlocks + kv_heads - 1, kv_heads * ceil_div(p.keys, kSmallestRange));
  int64_t rows = ranges * group * std::min(p.queries, kDecodeRows);
  return aligned(rows * p.head_dim * 4) + aligned(rows * 4);
}

}  // namespace sample_attention

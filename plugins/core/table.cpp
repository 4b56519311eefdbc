#include "table.h"

#include "../kernels/sampling/sample_params.h"

#include <algorithm>

namespace sample_attention {
namespace {

constexpr int64_t kTableBytes = int64_t(640) << 20;
constexpr int64_t kPiece = 256;  // alignment of the three arrays

int log2_of_power(int v) {
  int n = 0;
  while ((1 << n) < v) ++n;
  return n;
}

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t bytes) { return up(bytes, kPiece) * kPiece; }

int64_t tile_bytes(const Slices &s) { return kSampleRows * ((int64_t(2) << sample_slots_log2(s.block_keys_log2)) + 4); }

// Key tiles of all keys.
int64_t key_tiles(const sa_problem &p, const Slices &s) { return up(p.keys, int64_t(kSampleKeys) << s.key_log2); }

// Of one head and one group of rows, at most.
int64_t group_bytes(const sa_problem &p, const Slices &s) {
  int64_t tiles = key_tiles(p, s), step = int64_t(kSampleRows / kSampleKeys) << (s.row_log2 - s.key_log2);
  // The rows that a last group lacks, and those of a tile that is cut short, still have their key tiles counted.
  return s.classes * ((tiles + 2 * step) * tile_bytes(s) + up(tiles, kSampleTileLimit) * kSampleRows * 4);
}

}  // namespace

Slices::Slices(const sa_problem &p) {
  int row_stride = p.policy == SA_RESIDUE ? p.stride : p.policy == SA_TILE ? p.block_q / p.sample_rows : 1;
  classes = p.policy == SA_RESIDUE ? p.stride : 1;
  row_log2 = log2_of_power(row_stride);
  key_log2 = p.policy == SA_RESIDUE ? row_log2 : 0;
  tile_rows_log2 = log2_of_power(p.block_q) - row_log2;
  block_keys_log2 = log2_of_power(p.block_k) - key_log2;
}

TableShape::TableShape(const sa_problem &p, int first_tile, int tiles) {
  const Slices s(p);
  // `tile` counts its rows back from the last row of a tile. Only the call's last tile can be cut short; its rows then form a slice of their own.
  const bool cut = p.policy == SA_TILE && p.queries % p.block_q != 0 && int64_t(first_tile + tiles) * p.block_q > p.queries;
  full_rows = (tiles - (cut ? 1 : 0)) << s.tile_rows_log2;
  full_groups = static_cast<int>(up(full_rows, kSampleRows));
  groups = full_groups + (cut ? 1 : 0);
  // One past the last position of group g of whole tiles is end + span * g, and span is a whole number of key tiles.
  const int64_t span = int64_t(kSampleRows) << s.row_log2, tile_keys = int64_t(kSampleKeys) << s.key_log2;
  const int64_t end = int64_t(p.keys) - p.queries + int64_t(first_tile) * p.block_q + span;
  const int64_t all = key_tiles(p, s);
  group_step = static_cast<int>(span / tile_keys);
  group_tiles = static_cast<int>(groups == 1 ? std::min(up(end, tile_keys), all) : up(end, tile_keys));
  slice_tiles = groups * group_tiles + group_step * (groups * (groups - 1) / 2);
  splits = static_cast<int>(up(all, kSampleTileLimit));
  const int64_t units = int64_t(s.classes) * slice_tiles * kSampleRows;
  entries = units << sample_slots_log2(s.block_keys_log2);
  references = units;
  lses = int64_t(s.classes) * groups * splits * kSampleRows;
  head_bytes = padded(2 * entries) + padded(4 * references) + padded(4 * lses);
}

TableNeed::TableNeed(const sa_problem &p) {
  const Slices s(p);
  const int64_t group = group_bytes(p, s), heads = int64_t(p.batch) * p.heads;
  // A chunk has at most two groups more than its tiles fill: a rounding, and a last tile that is cut short. 3 pieces of padding.
  tile = up(group << s.tile_rows_log2, kSampleRows);
  fixed = 2 * group + 3 * kPiece;
  const int64_t whole = heads * (fixed + tile * up(p.queries, p.block_q));
  fixed += std::min(p.scratch_bytes > 0 ? std::min(p.scratch_bytes, kTableBytes) : kTableBytes, whole);
}

HeadSplit::HeadSplit(const sa_problem &p, const TableShape &shape, int64_t bytes) {
  const int group = p.heads / p.kv_heads;
  const int64_t total = int64_t(p.batch) * p.heads;
  const int64_t fit = std::max<int64_t>(std::min(bytes / shape.head_bytes, total), 1);
  if (fit >= group) {
    const int64_t launches = up(total, fit / group * group);
    unit = group;
    heads = static_cast<int>(up(up(total, launches), group) * group);
  } else {
    unit = static_cast<int>(fit);
    while (group % unit != 0) --unit;
    heads = unit;
  }
}

}  // namespace sample_attention

// Which rows and keys meet: slices of a call, groups of 256 slice rows, key tiles of 128 slice keys, and where the table keeps them.
#pragma once

#include "../common/real_keys.cuh"
#include "sample_params.h"

namespace sample_attention::sample_detail {

__device__ __forceinline__ bool full_head(const SampleParams &p, int head) { return (p.alpha != nullptr ? p.alpha[head] : p.alpha_all) >= 1.f; }

struct RealKeys : Span {
  __device__ __forceinline__ RealKeys(const SampleParams &p, int batch) : Span(real_keys(p.bounds, batch, p.keys)) {}
};

// Whether a query tile of the call keeps all blocks for meeting the last dense_rows: nobody asks for its masses.
__device__ __forceinline__ bool dense_tile(const SampleParams &p, const RealKeys &real, int tile) {
  const int rows_log2 = p.tile_rows_log2 + p.row_log2, shift = p.keys - p.queries;
  const int first = shift + (tile << rows_log2), last = shift + min((tile + 1) << rows_log2, p.queries) - 1;
  return meets_dense_rows(real, first, last, p.dense_rows);
}

// The key tiles that a group of rows is scored against: the same for every slice, the union of what they need.
struct KeyTiles {
  int first, count;

  __device__ __forceinline__ KeyTiles(const SampleParams &p, const RealKeys &real, int group) {
    int tiles = group >= p.full_groups ? p.tiles : min((group + 1) * (kSampleRows >> p.tile_rows_log2), p.tiles);
    int rows = (p.first_tile + tiles) << (p.tile_rows_log2 + p.row_log2);
    int end = min(p.keys - p.queries + min(rows, p.queries), real.last);  // one past the last key
    first = (real.first >> p.key_log2) / kSampleKeys;
    count = end > real.first ? ((end - 1) >> p.key_log2) / kSampleKeys + 1 - first : 0;
  }
};

// One slice of one row group, in slice coordinates.
struct Slice {
  int row0, row_limit;  // slice rows row0 .. row_limit - 1 exist (row_limit <= row0: none)
  int row_residue, key_residue;
  int key_low, key_high;  // slice keys that are real: key_low .. key_high
  int shift;

  __device__ __forceinline__ Slice(const SampleParams &p, const RealKeys &real, int group, int slice) {
    bool cut = group >= p.full_groups;
    int base = p.first_tile << p.tile_rows_log2;
    row0 = base + (cut ? p.full_rows : group * kSampleRows);
    int limit = cut ? base + (p.tiles << p.tile_rows_log2) : base + p.full_rows;
    int row_stride = 1 << p.row_log2;
    shift = p.keys - p.queries;
    if (p.classes > 1) {
      row_residue = slice;
      key_residue = (row_stride - ((shift + slice) & (row_stride - 1))) & (row_stride - 1);
    } else {
      row_residue = cut ? (p.queries - 1) & (row_stride - 1) : row_stride - 1;
      key_residue = 0;
    }
    // Arithmetic shifts round towards minus infinity: a residue beyond the end gives no rows.
    row_limit = min(limit, ((p.queries - 1 - row_residue) >> p.row_log2) + 1);
    key_low = max((real.first - key_residue + (1 << p.key_log2) - 1) >> p.key_log2, 0);
    key_high = (real.last - 1 - key_residue) >> p.key_log2;
  }

  __device__ __forceinline__ int position(const SampleParams &p, int row) const { return shift + row_residue + (row << p.row_log2); }

  // Last slice key that a row may see.
  __device__ __forceinline__ int key_end(const SampleParams &p, int row) const { return min((position(p, row) - key_residue) >> p.key_log2, key_high); }
};

// Index of a group's first key tile among the slice_tiles of one head.
__device__ __forceinline__ int first_slice_tile(const SampleParams &p, int group) { return group * p.group_tiles + p.group_step * (group * (group - 1) / 2); }

// Row of the table: of a slice's row (0 .. 255) of a group under a key tile. The rows that are summed together, those of one query tile in all slices, are
// neighbours.
__device__ __forceinline__ int64_t table_row(const SampleParams &p, int local_head, int slice, int group, int key_tile, int row) {
  const int64_t unit = int64_t(local_head) * p.slice_tiles + first_slice_tile(p, group) + key_tile;
  const int tile = row >> p.tile_rows_log2;
  return unit * kSampleRows * p.classes + ((tile * p.classes + slice) << p.tile_rows_log2) + (row - (tile << p.tile_rows_log2));
}

// Rows of the table between slice rows that lie `rows` apart, a power of two that the first one's position has as a zero bit.
__device__ __forceinline__ int table_rows(const SampleParams &p, int rows) { return rows >> p.tile_rows_log2 == 0 ? rows : rows * p.classes; }

// Index of [head_count, classes, groups, splits], of the log-sum-exps.
__device__ __forceinline__ int64_t lse_index(const SampleParams &p, int local_head, int slice, int group, int split) {
  return ((int64_t(local_head) * p.classes + slice) * p.groups + group) * p.splits + split;
}

}  // namespace sample_attention::sample_detail

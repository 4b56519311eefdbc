// The table between scoring and reduction (kernels/sampling): its shape, and how many heads one launch takes, from the problem's shape alone.
#pragma once

#include "sample_attention/types.h"

#include <cstdint>

namespace sample_attention {

// How rows and keys are cut into slices. Powers of two as logarithms.
struct Slices {
  int classes, row_log2, key_log2, tile_rows_log2, block_keys_log2;

  explicit Slices(const sa_problem &problem);
};

// The table of one head for the query tiles [first_tile, first_tile + tiles).
struct TableShape {
  int full_rows, full_groups, groups;        // as SampleParams
  int group_tiles, group_step, slice_tiles;  // as SampleParams
  int splits;                                // work items of the longest row
  int64_t entries, references, lses;         // of one head: 16-bit, 32-bit, 32-bit
  int64_t head_bytes;

  TableShape(const sa_problem &problem, int first_tile, int tiles);
};

// Bytes for the tables of a chunk: enough for one head, and for as many as make a launch worth while within scratch_bytes (or 640 MiB). Grows with batch,
// queries and keys.
struct TableNeed {
  int64_t fixed, tile;

  explicit TableNeed(const sa_problem &problem);
};

// Heads of one launch: head_unit heads share keys; both divide what follows them, and `heads` the total but for the last launch.
struct HeadSplit {
  int unit, heads;

  HeadSplit(const sa_problem &problem, const TableShape &shape, int64_t bytes);
};

}  // namespace sample_attention

// The rows that each policy samples (docs/op.md, "Selection", step 1).
#pragma once

#include "score.cuh"

namespace sample_attention::generic {

// Row of a slot of a class, or -1.
__device__ __forceinline__ int row_of(const Samples &s, const Inputs &in, int cls, int slot) {
  int row;
  switch (s.policy) {
    case SA_RESIDUE:
      row = s.first_row + ((cls - (in.keys - in.queries) - s.first_row) & (s.classes - 1)) + slot * s.classes;
      return row < in.queries ? row : -1;
    case SA_TILE: {
      const int first = s.first_row + slot / s.slots_per_tile * s.block_q;
      row = min(first + s.block_q, in.queries) - 1 - slot % s.slots_per_tile * s.row_step;
      return row >= first ? row : -1;
    }
    case SA_COLUMN_SLASH:
      row = in.queries - 1 - slot / s.sample_rows * s.segment - slot % s.sample_rows;
      return row >= 0 ? row : -1;
    default:
      row = in.queries - 1 - slot * s.row_step;
      return row >= 0 ? row : -1;
  }
}

// Slot of row `row` of tile `tile` (counted from the launch's first), the inverse of row_of; -1 for a row that is not sampled.
__device__ __forceinline__ int slot_of(const Samples &s, const Inputs &in, int cls, int tile, int row) {
  switch (s.policy) {
    case SA_RESIDUE: {
      const int from = row - s.first_row - ((cls - (in.keys - in.queries) - s.first_row) & (s.classes - 1));
      return from >= 0 && from % s.classes == 0 ? from / s.classes : -1;
    }
    case SA_TILE: {
      const int first = s.first_row + tile * s.block_q;
      const int back = min(first + s.block_q, in.queries) - 1 - row;
      return back % s.row_step == 0 ? tile * s.slots_per_tile + back / s.row_step : -1;
    }
    case SA_COLUMN_SLASH: {
      const int back = in.queries - 1 - row;
      return back % s.segment < s.sample_rows ? back / s.segment * s.sample_rows + back % s.segment : -1;
    }
    default: {
      const int back = in.queries - 1 - row;
      return back % s.row_step == 0 ? back / s.row_step : -1;
    }
  }
}

// The keys of a class are first_key + n * classes.
__device__ __forceinline__ int first_key(const Samples &s, int cls) { return -cls & (s.classes - 1); }

__device__ __forceinline__ bool is_full_head(const Samples &s, int head) {
  return (s.alpha != nullptr ? s.alpha[head] : s.alpha_all) >= 1.f || (s.alpha_slash != nullptr ? s.alpha_slash[head] : s.alpha_slash_all) >= 1.f;
}

// The sampled rows of a score tile.
struct Rows {
  int position[kTile];  // -1: no row, or not a real token
  float lse[kTile];
};

// Fills rows and tile.query_at with the slots slot0 .. slot0 + 63 of a class; returns the last position among them, -1 for none. Barriers before and after.
__device__ __forceinline__ int gather_rows(Tile &tile, Rows &rows, const Samples &s, const Inputs &in, const Real &real, int batch, int head, int cls,
                                           int slot0, const float *lse) {
  __syncthreads();
  if (threadIdx.x < kTile) {
    const int slot = slot0 + threadIdx.x;
    const int row = slot < s.slots ? row_of(s, in, cls, slot) : -1;
    const int position = row + in.keys - in.queries;
    const bool sampled = row >= 0 && real.has(position);
    rows.position[threadIdx.x] = sampled ? position : -1;
    rows.lse[threadIdx.x] = sampled && lse != nullptr ? lse[slot] : kInfinity;
    tile.query_at[threadIdx.x] = sampled ? batch * in.query.b + head * in.query.h + row * in.query.s : -1;
  }
  __syncthreads();
  int last = -1;
  for (int r = 0; r < kTile; ++r) last = max(last, rows.position[r]);
  return last;
}

}  // namespace sample_attention::generic

// What follows from a problem's shape alone: tiles, chunks, slices, and the layout of the workspace.
#pragma once

#include "../kernels/prefill/attend_params.h"
#include "../kernels/sampling/sample_params.h"
#include "sample_attention/kernels.h"

#include <cstdint>

namespace sample_attention {

constexpr int kDecodeRows = 16;        // S up to this is full attention by specification
constexpr int kMaxKeys = 1 << 30;      // positions stay below the kernels' "no key" marker
constexpr int kMaxBlocks = 56 * 1024;  // floats in the 227 KiB of shared memory of the selection
constexpr int64_t kDefaultScratch = int64_t(512) << 20;
constexpr int kTickets = 16;

struct Plan {
  int tiles, blocks;   // nQ of block_q rows, nK of block_k keys
  int tiles_per_list;  // 128-row tiles of one list: block_q / 128
  int chunk;           // query tiles of one pass over sample, filter, attend
  int classes, row_log2, key_log2, tile_rows_log2, block_keys_log2;
  int groups;      // row groups of a full chunk, at most
  int weight_row;  // floats of one key slice in the weights
  int splits;      // key ranges of decode

  explicit Plan(const sa_problem &problem);
};

// Hands out consecutive aligned pieces. With a null base it only counts, so size and layout cannot differ.
class Carver {
 public:
  explicit Carver(void *base) : base_(static_cast<char *>(base)) {}
  template <class T>
  T *take(int64_t count) {
    offset_ = (offset_ + 255) / 256 * 256;
    T *piece = base_ == nullptr ? nullptr : reinterpret_cast<T *>(base_ + offset_);
    offset_ += count * static_cast<int64_t>(sizeof(T));
    return piece;
  }
  int64_t used() const { return (offset_ + 255) / 256 * 256; }

 private:
  char *base_;
  int64_t offset_ = 0;
};

struct Workspace {
  int32_t *tickets;    // [kTickets]
  int32_t *order;      // [B * Hq * 128-row tiles]
  float *weight;       // [B, Hkv, key slices, weight_row]
  float *lse;          // [B, Hq, classes, groups, 256]
  float *mass;         // [B, Hq, chunk, nK]
  int32_t *counts;     // [B, Hq, chunk]
  int32_t *indices;    // [B, Hq, chunk, nK]
  float *partial;      // [splits, B, Hq, S, D]
  float *partial_lse;  // [splits, B, Hq, S]
  int64_t bytes;

  Workspace(const sa_problem &problem, const Plan &plan, void *base);
};

}  // namespace sample_attention

// A tile of 16-bit elements in shared memory for ldmatrix: rows of kHeadDim elements, 16-byte piece c of row r at piece c ^ (r % 8), so that eight rows of
// any one piece lie in different banks.
#pragma once

#include "mma_sm80.cuh"

namespace sample_attention::sm80 {

template <int kHeadDim>
struct TileRows {
  static_assert(kHeadDim % 64 == 0, "a row fills the banks: the swizzle stays inside it, and the step below is one XOR");
  static constexpr int kPieces = kHeadDim / 8;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kSteps = kHeadDim / 16;  // of 16 columns

  // Offset of a piece from the start of the tile, which is aligned to 1024 bytes.
  static __device__ __forceinline__ uint32_t at(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }

  // What a lane hands to ldmatrix for 16 rows and the first 16 columns. Columns 16 k onwards: the address XOR step(k).
  // Matrices by (row half, column half): operand A of mma, and (transposed) operand B of P V.
  static __device__ __forceinline__ uint32_t rows_first(int lane) { return at(lane % 16, lane / 16); }
  // Matrices by (column half, row half): operand B of Q K^T, keys as columns.
  static __device__ __forceinline__ uint32_t columns_first(int lane) { return at(lane / 16 * 8 + lane % 8, lane / 8 % 2); }
  static constexpr __device__ __forceinline__ uint32_t step(int k) { return static_cast<uint32_t>(k) << 5; }
};

// scores (kTiles of 16 rows x 16 kGroups keys) = Q K^T. query(k, a) gives the A operands of columns 16 k onwards; keys: ldmatrix address, columns_first.
template <class Element, class Rows, int kTiles, int kGroups, class Query>
__device__ __forceinline__ void score_tile(float (&scores)[kTiles][2 * kGroups][4], uint32_t keys, const Query &query) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int e = 0; e < 8 * kGroups; ++e) scores[m][e / 4][e % 4] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < Rows::kSteps; ++k) {
    uint32_t a[kTiles][4];
    query(k, a);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t b[4];
      load_matrices(b, (keys ^ Rows::step(k)) + g * 16 * Rows::kRowBytes);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma<Element>(scores[m][2 * g], a[m], b[0], b[1]);
        mma<Element>(scores[m][2 * g + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace sample_attention::sm80

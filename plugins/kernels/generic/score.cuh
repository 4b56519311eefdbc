// What the generic kernels share: elements of any type as floats, which pairs are allowed, and a 64 x 64 tile of scores by float32 multiply-add.
//
// A thread block of 256 threads is a 16 x 16 grid; thread (y, x) owns rows 4y .. 4y+3 and columns 4x .. 4x+3. The 16 threads of a row group lie in one half of
// a warp, so row reductions are shuffles.
#pragma once

#include "../common/launch.cuh"
#include "generic_params.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

namespace sample_attention::generic {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows and columns of a score tile
constexpr int kSlab = 32;   // columns of query and key in shared memory at a time
constexpr int kPitch = 68;  // floats of a shared row: 16-byte aligned, and 4 k + row meets 32 banks for 8 k and 4 rows
constexpr float kInfinity = INFINITY;

__device__ __forceinline__ float load(const void *data, int64_t index, int dtype) {
  if (dtype == SA_FLOAT32) return static_cast<const float *>(data)[index];
  const uint16_t bits = static_cast<const uint16_t *>(data)[index];
  if (dtype == SA_BFLOAT16) return __uint_as_float(uint32_t(bits) << 16);
  __half half;
  memcpy(&half, &bits, sizeof(half));
  return __half2float(half);
}

__device__ __forceinline__ void store(void *data, int64_t index, int dtype, float value) {
  if (dtype == SA_FLOAT32) {
    static_cast<float *>(data)[index] = value;
  } else if (dtype == SA_BFLOAT16) {
    static_cast<__nv_bfloat16 *>(data)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half *>(data)[index] = __float2half_rn(value);
  }
}

// Which keys of a batch item are real.
struct Real {
  const uint8_t *mask;  // of the item, or null
  int first, end;

  __device__ __forceinline__ Real(const Inputs &in, int batch) {
    first = in.bounds != nullptr ? max(in.bounds[2 * batch], 0) : 0;
    end = in.bounds != nullptr ? min(in.bounds[2 * batch + 1], in.keys) : in.keys;
    mask = in.key_mask != nullptr ? in.key_mask + int64_t(batch) * in.keys : nullptr;
  }
  __device__ __forceinline__ bool has(int j) const { return j >= first && j < end && (mask == nullptr || mask[j] != 0); }
};

// Rows and columns of a score tile, and the slabs that they are multiplied from.
struct Tile {
  alignas(16) float slabs[2 * kSlab * kPitch];  // [query, key][kSlab][kPitch], k-major; free between two products
  int64_t query_at[kTile];                      // element offset of the row, -1: none
  int64_t key_at[kTile];
};

struct Scores {
  float at[4][4];
};

__device__ __forceinline__ void load_slab(float *slab, const void *data, const int64_t *at, int first, int width, int dtype) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 4
  for (int e = 0; e < 8; ++e) {
    const int row = warp * 8 + e % 2 * 4 + lane / 8, k = e / 2 * 8 + lane % 8;
    const int64_t offset = at[row];
    slab[k * kPitch + row] = offset >= 0 && first + k < width ? load(data, offset + first + k, dtype) : 0.f;
  }
}

// This thread's 4 x 4 cells of a product of two k-major slabs of kDepth rows.
template <int kDepth>
__device__ __forceinline__ void multiply(Scores &out, const float *left, const float *right) {
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) out.at[r][c] = 0.f;
  }
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    const float4 a = *reinterpret_cast<const float4 *>(left + k * kPitch + 4 * y);
    const float4 b = *reinterpret_cast<const float4 *>(right + k * kPitch + 4 * x);
    const float rows[4] = {a.x, a.y, a.z, a.w}, columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out.at[r][c] = fmaf(rows[r], columns[c], out.at[r][c]);
    }
  }
}

__device__ __forceinline__ void add(Scores &sum, const Scores &part) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum.at[r][c] += part.at[r][c];
  }
}

// This thread's four rows of its column c in a [column][row] array of shared memory.
__device__ __forceinline__ float4 &own_cells(float *cells, int c) {
  return *reinterpret_cast<float4 *>(cells + (threadIdx.x % 16 * 4 + c) * kPitch + threadIdx.x / 16 * 4);
}

// Scaled and capped scores of the tile's rows and columns. Begins with a barrier, which also publishes query_at and key_at; the slabs are free after the next.
// cells: [64][kPitch] of shared memory that holds each thread's running sums for a kernel without registers for them, or null.
template <bool kInCells>
__device__ __forceinline__ Scores score(Tile &tile, const Inputs &in, float *cells = nullptr) {
  Scores s;
  for (int first = 0; first < in.head_dim; first += kSlab) {
    __syncthreads();
    load_slab(tile.slabs, in.query.data, tile.query_at, first, in.head_dim, in.dtype);
    load_slab(tile.slabs + kSlab * kPitch, in.key.data, tile.key_at, first, in.head_dim, in.dtype);
    __syncthreads();
    // A sum of sums: its error grows with the root of 32 terms and of the slabs, not of their product.
    Scores part;
    multiply<kSlab>(part, tile.slabs, tile.slabs + kSlab * kPitch);
    if constexpr (kInCells) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float4 &cell = own_cells(cells, c);
        const float4 sum = first > 0 ? cell : make_float4(0.f, 0.f, 0.f, 0.f);
        cell = make_float4(sum.x + part.at[0][c], sum.y + part.at[1][c], sum.z + part.at[2][c], sum.w + part.at[3][c]);
      }
    } else {
      if (first > 0) add(part, s);
      s = part;
    }
  }
  if constexpr (kInCells) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float4 cell = own_cells(cells, c);
      s.at[0][c] = cell.x;
      s.at[1][c] = cell.y;
      s.at[2][c] = cell.z;
      s.at[3][c] = cell.w;
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s.at[r][c] *= in.scale;
      if (in.softcap > 0.f) s.at[r][c] = in.softcap * tanhf(s.at[r][c] / in.softcap);
    }
  }
  return s;
}

// Over the 16 threads of a row group.
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
  for (int d = 8; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
  return v;
}

__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int d = 8; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// Whether no batch item is asked for: the common case of the launches that follow fast kernels for masks with holes.
__device__ __forceinline__ bool nothing_to_do(const Inputs &in) {
  if (in.only == nullptr) return false;
  for (int b = 0; b < in.batch; ++b) {
    if (in.only[b] != 0) return false;
  }
  return true;
}

// Blocks of a grid over `items`: all of them, or, where `only` may leave nothing to do, as many as fill the device.
inline unsigned grid_of(int64_t items, const int32_t *only, int multiprocessors) {
  const int64_t most = only != nullptr ? int64_t(8) * multiprocessors : (int64_t(1) << 31) - 1;
  return static_cast<unsigned>(items < most ? items : most);
}

}  // namespace sample_attention::generic

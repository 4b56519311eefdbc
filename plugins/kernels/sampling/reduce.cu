// From the table of scoring to block masses, and to what rows retain inside kept blocks. Both are bound by reading the table once.
#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "slice.cuh"

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sample_attention {
namespace {

using namespace sample_detail;

constexpr int kWarps = 4;
constexpr int kLoads = 4;         // rows of a lane under way together
constexpr int kStripBlocks = 32;  // blocks of a warp's strip, at least

// The rows of one query tile in the table, seen by one warp.
struct TileRows {
  int batch, head, local_head, tile;
  int group, row;  // first row in its group of 256
  int begun;       // blocks that begin at or before the last row
  KeyTiles keys;

  __device__ __forceinline__ TileRows(const SampleParams &p, int local, int tile_index)
      : batch((p.first_head + local) / p.heads),
        head((p.first_head + local) % p.heads),
        local_head(local),
        tile(tile_index),
        keys(KeyTiles(p, RealKeys(p, (p.first_head + local) / p.heads), group_of(p, tile_index))) {
    const int slice_row = tile << p.tile_rows_log2;
    group = group_of(p, tile);
    row = slice_row >= p.full_rows ? slice_row - p.full_rows : slice_row % kSampleRows;
    const int last_row = min((p.first_tile + tile + 1) << (p.tile_rows_log2 + p.row_log2), p.queries) - 1;
    begun = ((p.keys - p.queries + last_row) >> (p.block_keys_log2 + p.key_log2)) + 1;
  }

  static __device__ __forceinline__ int group_of(const SampleParams &p, int tile) {
    const int slice_row = tile << p.tile_rows_log2;
    return slice_row >= p.full_rows ? p.full_groups : slice_row / kSampleRows;
  }

  // Base-2 log-sum-exp of a row's whole sample: its work items joined; +inf for a row without a sample.
  __device__ __forceinline__ float normaliser(const SampleParams &p, int slice, int at) const {
    const int64_t index = lse_index(p, local_head, slice, group, 0);
    const int parts = max((keys.count + kSampleTileLimit - 1) / kSampleTileLimit, 1);
    float lse = p.lse[index * kSampleRows + at];
    for (int s = 1; s < parts; ++s) {
      const float other = p.lse[(index + s) * kSampleRows + at];
      if (other == INFINITY) continue;
      if (lse == INFINITY) {
        lse = other;
      } else {
        const float top = fmaxf(lse, other);  // a NaN goes through the sum
        lse = top + log2f(ptx::exp2_fast(lse - top) + ptx::exp2_fast(other - top));
      }
    }
    return lse;
  }

  // Of the table, for all slices: classes << tile_rows_log2 rows follow, slice after slice.
  __device__ __forceinline__ int64_t first_row(const SampleParams &p, int key_tile) const {
    return ((int64_t(local_head) * p.slice_tiles + first_slice_tile(p, group) + key_tile) * kSampleRows + row) * p.classes;
  }
};

// Slot of a row in a key tile -> block of the key tile: the order in which RowBlocks of sample_sm90.cuh leaves them.
template <int kSlotsLog2>
__device__ __forceinline__ int block_of_slot(int slot) {
  return kSlotsLog2 == 5 ? 4 * (slot % 8) + slot / 8 % 2 * 2 + slot / 16 : slot;
}

// kCount halves in one load. (A memcpy from global memory is taken apart into words of 4 bytes.)
template <int kCount>
using Halves = std::conditional_t<kCount == 1, uint16_t, std::conditional_t<kCount == 2, uint32_t, std::conditional_t<kCount == 4, uint2, uint4>>>;

constexpr int kTileRows = 256;  // sampled rows of a query tile, at most

// A thread block takes one query tile and some key tiles; a warp sums the tile's rows for a strip of them.
template <int kSlotsLog2>
__global__ void __launch_bounds__(32 * kWarps) reduce_kernel(const __grid_constant__ SampleParams p) {
  constexpr int kSlots = 1 << kSlotsLog2;
  constexpr int kCount = kSlots < 8 ? kSlots : 8;  // slots of a lane
  constexpr int kLanes = kSlots / kCount;          // lanes of a row
  constexpr int kRowLanes = 32 / kLanes;
  constexpr int kStrip = kStripBlocks / kSlots > 1 ? kStripBlocks / kSlots : 1;  // key tiles
  __shared__ float normaliser[kTileRows];
  ptx::launch_dependents();
  ptx::wait_for_primary();
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) *p.ticket = 0;
  const int lane = threadIdx.x % 32;
  const TileRows rows(p, gridDim.z - 1 - blockIdx.z, blockIdx.x);  // the last heads first: their part of the table is still in L2
  if (full_head(p, rows.head) || int(blockIdx.y) * kWarps * kStrip * kSlots >= rows.begun) return;
  if (dense_tile(p, RealKeys(p, rows.batch), p.first_tile + rows.tile)) return;
  const int count = p.classes << p.tile_rows_log2, row_mask = (1 << p.tile_rows_log2) - 1;
  for (int i = threadIdx.x; i < count; i += 32 * kWarps) normaliser[i] = rows.normaliser(p, i >> p.tile_rows_log2, rows.row + (i & row_mask));
  __syncthreads();
  // A block of more than 128 slice keys takes several key tiles of one slot.
  const int joined = kSlotsLog2 == 0 ? 1 << (p.block_keys_log2 - 7) : 1;
  const int first = (blockIdx.y * kWarps + threadIdx.x / 32) * kStrip;
  float *out = p.mass + (int64_t(p.first_head + rows.local_head) * p.tiles + rows.tile) * p.blocks;
  for (int at = first; at < first + kStrip && at * kSlots < rows.begun; ++at) {
    float sum[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] = 0.f;
    for (int key_tile = at * joined; key_tile < (at + 1) * joined; ++key_tile) {
      if (key_tile < rows.keys.first || key_tile >= rows.keys.first + rows.keys.count) continue;
      const int64_t base = rows.first_row(p, key_tile);
      const float *reference = p.reference + base;
      const uint16_t *table = p.table + (base << kSlotsLog2) + lane % kLanes * kCount;
      for (int i = lane / kLanes; i < count; i += kLoads * kRowLanes) {
        Halves<kCount> entry[kLoads];
        float exponent[kLoads];
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          const int at_row = min(i + l * kRowLanes, count - 1);
          entry[l] = *reinterpret_cast<const Halves<kCount> *>(table + (at_row << kSlotsLog2));
          exponent[l] = reference[at_row];
        }
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          const int at_row = i + l * kRowLanes;
          const float lse = at_row < count ? normaliser[at_row] : INFINITY;
          if (lse == INFINITY) continue;  // no sample: whatever the table says
          const float factor = ptx::exp2_fast(exponent[l] - lse);
          uint16_t half[kCount];
          memcpy(half, &entry[l], sizeof(half));
#pragma unroll
          for (int k = 0; k < kCount; ++k) sum[k] = fmaf(__half2float(__ushort_as_half(half[k])), factor, sum[k]);
        }
      }
    }
    // Over the row lanes: halves of the vector go to either side while there is more than one value, then plain sums.
    int n = kCount, offset = 0;
    bool writes = true;
#pragma unroll
    for (int bit = 16; bit >= kLanes; bit /= 2) {
      if (n > 1) {
        n /= 2;
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int k = 0; k < kCount / 2; ++k) {
          if (k < n) {
            const float send = upper ? sum[k] : sum[k + n];
            sum[k] = (upper ? sum[k + n] : sum[k]) + __shfl_xor_sync(~0u, send, bit);
          }
        }
        offset += upper ? n : 0;
      } else {
        sum[0] += __shfl_xor_sync(~0u, sum[0], bit);
        writes = writes && (lane & bit) == 0;
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (k < n && writes) {
        const int block = at * kSlots + block_of_slot<kSlotsLog2>(lane % kLanes * kCount + offset + k);
        if (block < rows.begun) out[block] = sum[k];
      }
    }
  }
}

template <int kSlotsLog2>
__device__ __forceinline__ int slot_of_block(int block) {
  return kSlotsLog2 == 5 ? (block % 2 * 2 + block / 2 % 2) * 8 + block / 4 : block;
}

constexpr int kRetainThreads = 128;

// A thread block sums the kept entries of each row of one query tile.
template <int kSlotsLog2>
__global__ void __launch_bounds__(kRetainThreads) retain_kernel(const __grid_constant__ RetainParams p) {
  constexpr int kSlots = 1 << kSlotsLog2;
  __shared__ float lows[kRetainThreads / 32], sums[kRetainThreads / 32];
  __shared__ int counted[kRetainThreads / 32];
  ptx::launch_dependents();
  ptx::wait_for_primary();
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.z == 0) *p.ticket = 0;
  const TileRows rows(p, blockIdx.z, blockIdx.x);
  const int64_t list = int64_t(p.first_head + rows.local_head) * p.tiles + rows.tile;
  const int32_t *kept = p.indices + list * p.blocks;
  const int kept_count = p.counts[list];
  const int joined = kSlotsLog2 == 0 ? 1 << (p.block_keys_log2 - 7) : 1;
  const int count = full_head(p, rows.head) ? 0 : p.classes << p.tile_rows_log2;
  float low = INFINITY, sum = 0.f;
  int sampled = 0;
  for (int i = threadIdx.x; i < count; i += kRetainThreads) {
    const float lse = rows.normaliser(p, i >> p.tile_rows_log2, rows.row + (i & ((1 << p.tile_rows_log2) - 1)));
    if (lse == INFINITY) continue;
    float retained = 0.f, factor = 0.f;
    int at = -1;
    int64_t entry = 0;
    for (int k = 0; k < kept_count; ++k) {
      const int block = kept[k];
      for (int key_tile = (block >> kSlotsLog2) * joined; key_tile < ((block >> kSlotsLog2) + 1) * joined; ++key_tile) {
        if (key_tile < rows.keys.first || key_tile >= rows.keys.first + rows.keys.count) continue;
        if (key_tile != at) {
          at = key_tile;
          entry = rows.first_row(p, key_tile) + i;
          factor = ptx::exp2_fast(p.reference[entry] - lse);
        }
        const uint16_t value = p.table[(entry << kSlotsLog2) + slot_of_block<kSlotsLog2>(block % kSlots)];
        retained = fmaf(__half2float(__ushort_as_half(value)), factor, retained);
      }
    }
    retained = retained > 1.f ? 1.f : retained;  // rounding; a NaN stays
    low = retained >= low ? low : retained;
    sum += retained;
    ++sampled;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(~0u, low, d);
    low = other >= low || isnan(low) ? low : other;
    sum += __shfl_xor_sync(~0u, sum, d);
    sampled += __shfl_xor_sync(~0u, sampled, d);
  }
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = low;
    sums[threadIdx.x / 32] = sum;
    counted[threadIdx.x / 32] = sampled;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kRetainThreads / 32; ++w) {
      low = lows[w] >= low || isnan(low) ? low : lows[w];
      sum += sums[w];
      sampled += counted[w];
    }
    float *out = p.retained + (int64_t(p.first_head + rows.local_head) * p.call_tiles + p.first_tile + rows.tile) * 3;
    out[0] = low;
    out[1] = sum;
    reinterpret_cast<int32_t *>(out)[2] = sampled;
  }
}

// Calls f with the number of slots, log2, as a compile-time constant.
template <class F>
cudaError_t with_slots(const SampleParams &p, F f) {
  switch (sample_slots_log2(p.block_keys_log2)) {
    case 0:
      return f(std::integral_constant<int, 0>{});
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 6>{});
  }
}

}  // namespace

cudaError_t launch_reduce(const SampleParams &p, cudaStream_t stream) {
  return with_slots(p, [&](auto slots_log2) {
    constexpr int kSlotsLog2 = decltype(slots_log2)::value;
    const int strip = (kStripBlocks > (1 << kSlotsLog2) ? kStripBlocks : 1 << kSlotsLog2) * kWarps;  // blocks of a thread block
    const dim3 grid(p.tiles, (p.blocks + strip - 1) / strip, p.head_count);
    return launch(reduce_kernel<kSlotsLog2>, grid, 32 * kWarps, 0, stream, p, true);
  });
}

cudaError_t launch_retain(const RetainParams &p, cudaStream_t stream) {
  return with_slots(p, [&](auto slots_log2) {
    return launch(retain_kernel<decltype(slots_log2)::value>, dim3(p.tiles, 1, p.head_count), kRetainThreads, 0, stream, p, true);
  });
}

}  // namespace sample_attention

// Block-sparse FlashAttention with mma.sync and cp.async: compute capability 8.0 and newer.
//
// A thread block is one 128-row query tile: four warps own 32 rows each, so that a fragment of K or V serves two row tiles and shared memory keeps up with the
// tensor cores. K and V tiles of 64 keys (128 at D = 64) take turns in a ring of three slots: while one is multiplied, the next is in flight and the one
// after is requested. 80 KiB at D = 128 (64 at 64): two thread blocks share an SM of A100, H100 and H200, and one fits the 99 KiB of GA10x and Ada. Tiles are
// walked from the last to the first, and what is read is the list's, as in attend_sm90.cuh.
#pragma once

#include "../common/launch.cuh"
#include "../common/logits.cuh"
#include "../common/pack.cuh"
#include "../common/tile_sm80.cuh"
#include "attend_params.h"
#include "work.cuh"

#include <cuda_runtime_api.h>

namespace sample_attention {

template <class Element_, int kHeadDim_>
struct AttendSm80Traits {
  using Element = Element_;
  using Rows = sm80::TileRows<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  // As many keys as the registers hold: 32 rows x kBlockN scores and 32 rows x D outputs of a warp.
  static constexpr int kBlockN = kHeadDim == 64 ? 128 : 64;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSlots = 3;
  static constexpr int kQueryBytes = kAttendRows * Rows::kRowBytes;
  static constexpr int kSlotBytes = kBlockN * Rows::kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kSlotBytes;
  static_assert(kAttendRows == 32 * kWarps && kSharedBytes <= 99 * 1024, "a thread block of GA10x and Ada has 99 KiB of shared memory");
};

// Two thread blocks an SM: 128 output registers at D = 128 leave no room for a third.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) attend_sm80_kernel(const __grid_constant__ AttendSm80Params p) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  using attend_detail::kNoKey;
  constexpr int kHeadDim = Traits::kHeadDim, kBlockN = Traits::kBlockN;
  constexpr int kRowsAPass = Traits::kThreads / Rows::kPieces;  // a multiple of 8: every row that a thread copies has the same swizzle
  static_assert(kRowsAPass % 8 == 0);
  unsigned char *shared = dynamic_shared();
  const uint32_t query_tile = sm80::shared_address(shared);
  const uint32_t ring = query_tile + Traits::kQueryBytes;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int batch, head, tile;
  attend_detail::decode_item(p, blockIdx.x, batch, head, tile);
  const int kv_head = head / (p.heads / p.kv_heads);
  const Span real = attend_detail::real_keys(p, batch);
  const attend_detail::Units list(p, real, batch, head, tile);
  const int unit = 1 << p.unit_log2;
  const int units = kBlockN >> p.unit_log2;
  const int key_tiles = (list.count + units - 1) / units;
  const int first_row = tile * kAttendRows;
  const int first_position = p.keys - p.queries + first_row;
  const LogitScale logit(p.scale, p.softcap);
  const float multiplier = logit.multiplier;

  const int copy_row = threadIdx.x / Rows::kPieces, copy_piece = threadIdx.x % Rows::kPieces;
  const uint32_t copy_target = Rows::at(copy_row, copy_piece);
  const Element *key = static_cast<const Element *>(p.key) + batch * p.key_b + kv_head * p.key_h + copy_piece * 8;
  const Element *value = static_cast<const Element *>(p.value) + batch * p.value_b + kv_head * p.value_h + copy_piece * 8;

  // First keys of the list entries of a key tile: lane l holds that of entry l mod units.
  auto starts_of = [&](int n) { return n >= 0 ? list.start(p, n * units + lane % units) : kNoKey; };
  auto start_at = [&](int starts, int row) { return units == 1 ? starts : __shfl_sync(~0u, starts, row >> p.unit_log2); };
  // Rows that are no real keys become zeros, whatever the tensor holds there.
  auto copy_tile = [&](uint32_t slot, const Element *source, int64_t stride, int starts) {
#pragma unroll 4
    for (int i = 0; i < kBlockN / kRowsAPass; ++i) {
      const int row = i * kRowsAPass + copy_row;
      const int at = start_at(starts, row) + (row & (unit - 1));
      const bool inside = at >= real.first && at < real.last;
      sm80::copy_16(ring + slot * Traits::kSlotBytes + copy_target + i * kRowsAPass * Rows::kRowBytes, source + (inside ? at * stride : 0), inside);
    }
  };

  float out[2][kHeadDim / 8][4] = {};
  float row_max[2][2], row_sum[2][2];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    row_max[e / 2][e % 2] = -INFINITY;
    row_sum[e / 2][e % 2] = 0.f;
  }

  if (key_tiles > 0) {
    int starts = starts_of(key_tiles - 1);
    {
      const Element *query = static_cast<const Element *>(p.query) + batch * p.query_b + head * p.query_h + copy_piece * 8;
#pragma unroll
      for (int i = 0; i < kAttendRows / kRowsAPass; ++i) {
        const int row = first_row + i * kRowsAPass + copy_row;
        const bool inside = row < p.queries;
        sm80::copy_16(query_tile + copy_target + i * kRowsAPass * Rows::kRowBytes, query + (inside ? row * p.query_s : 0), inside);
      }
    }
    copy_tile(0, key, p.key_s, starts);
    sm80::copy_commit();
    copy_tile(1, value, p.value_s, starts);
    sm80::copy_commit();
    int next_starts = starts_of(key_tiles - 2);

    // Addresses for ldmatrix, from the start of a tile.
    const uint32_t query_at = query_tile + warp * 32 * Rows::kRowBytes + Rows::rows_first(lane);
    const uint32_t key_at = ring + Rows::columns_first(lane), value_at = ring + Rows::rows_first(lane);

    uint32_t key_slot = 0;
    for (int n = key_tiles - 1; n >= 0; --n) {
      const uint32_t value_slot = key_slot == 2 ? 0 : key_slot + 1, free_slot = value_slot == 2 ? 0 : value_slot + 1;
      sm80::copy_wait<1>();
      __syncthreads();  // the keys have landed for every thread; nobody reads the values before any more
      if (n > 0) copy_tile(free_slot, key, p.key_s, next_starts);
      sm80::copy_commit();
      const int after_next = starts_of(n - 2);

      float scores[2][kBlockN / 8][4];
      sm80::score_tile<Element, Rows, 2, kBlockN / 16>(scores, key_at + key_slot * Traits::kSlotBytes, [&](int k, uint32_t (&a)[2][4]) {
        sm80::load_matrices(a[0], query_at ^ Rows::step(k));
        sm80::load_matrices(a[1], (query_at ^ Rows::step(k)) + 16 * Rows::kRowBytes);
      });

      if (logit.capped()) {
#pragma unroll
        for (int e = 0; e < kBlockN; ++e) {
          float &s = scores[e / (kBlockN / 2)][e / 4 % (kBlockN / 8)][e % 4];
          s = logit.cap(s);
        }
      }
      const bool masked = starts + unit - 1 > first_position || starts < real.first || starts + unit > real.last;
      if (__any_sync(~0u, masked)) {
#pragma unroll
        for (int j = 0; j < kBlockN / 8; ++j) {
          const int first = start_at(starts, 8 * j) + ((8 * j) & (unit - 1)) + 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const bool outside = first + i < real.first || first + i >= real.last;
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                if (outside || first + i > first_position + warp * 32 + m * 16 + r * 8 + lane / 4) scores[m][j][2 * r + i] = -INFINITY;
              }
            }
          }
        }
      }
      uint32_t probs[2][kBlockN / 16][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float rescale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float peak = row_max[m][r];
#pragma unroll
          for (int j = 0; j < kBlockN / 8; ++j) peak = fmaxf(peak, fmaxf(scores[m][j][2 * r], scores[m][j][2 * r + 1]));
          peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
          peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
          // A row that has met no key yet has peak -inf: subtract 0 instead, so that its probabilities are exp2(-inf) = 0.
          const float shift = peak == -INFINITY ? 0.f : peak * multiplier;
          rescale[r] = ptx::exp2_fast(row_max[m][r] * multiplier - shift);
          row_max[m][r] = peak;
          float sum = 0.f;
#pragma unroll
          for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float &s = scores[m][j][2 * r + i];
              s = ptx::exp2_fast(fmaf(s, multiplier, -shift));
              sum += s;
            }
          }
          row_sum[m][r] = row_sum[m][r] * rescale[r] + sum;
        }
        // Accumulator pairs in the order of operand A: (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8).
#pragma unroll
        for (int e = 0; e < kBlockN / 4; ++e) probs[m][e / 4][e % 4] = pack<Element>(scores[m][e / 2][e % 2 * 2], scores[m][e / 2][e % 2 * 2 + 1]);
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[m][j][e] *= rescale[e / 2];
        }
      }

      sm80::copy_wait<1>();
      __syncthreads();  // the values have landed for every thread; nobody reads the keys any more
      if (n > 0) copy_tile(key_slot, value, p.value_s, next_starts);
      sm80::copy_commit();
#pragma unroll
      for (int k = 0; k < kBlockN / 16; ++k) {
#pragma unroll
        for (int j = 0; j < Rows::kSteps; ++j) {
          uint32_t b[4];
          sm80::load_matrices_transposed(b, ((value_at + value_slot * Traits::kSlotBytes) ^ Rows::step(j)) + k * 16 * Rows::kRowBytes);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            sm80::mma<Element>(out[m][2 * j], probs[m][k], b[0], b[1]);
            sm80::mma<Element>(out[m][2 * j + 1], probs[m][k], b[2], b[3]);
          }
        }
      }
      starts = next_starts;
      next_starts = after_next;
      key_slot = free_slot;
    }
  }

  // The query rows of this warp are spent: they carry its output to 16-byte stores.
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[m][r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      const int row = warp * 32 + m * 16 + r * 8 + lane / 4;
      if (p.lse != nullptr && lane % 4 == 0 && first_row + row < p.queries) {
        p.lse[(int64_t(batch) * p.heads + head) * p.queries + first_row + row] = sum == 0.f ? -INFINITY : row_max[m][r] * multiplier * kLn2 + logf(sum);
      }
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t *>(shared + Rows::at(row, j) + lane % 4 * 4) = pack<Element>(out[m][j][2 * r] * inverse, out[m][j][2 * r + 1] * inverse);
      }
    }
  }
  __syncwarp();
  Element *output = static_cast<Element *>(p.output) + batch * p.output_b + head * p.output_h;
#pragma unroll
  for (int i = 0; i < Rows::kPieces; ++i) {
    const int row = warp * 32 + (i * 32 + lane) / Rows::kPieces, piece = lane % Rows::kPieces;
    if (first_row + row < p.queries) {
      *reinterpret_cast<uint4 *>(output + (first_row + row) * p.output_s + piece * 8) = *reinterpret_cast<const uint4 *>(shared + Rows::at(row, piece));
    }
  }
}

template <class Traits>
cudaError_t launch_attend_sm80(const AttendSm80Params &p, cudaStream_t stream) {
  return launch(attend_sm80_kernel<Traits>, dim3(static_cast<unsigned>(int64_t(p.batch) * p.heads * p.tiles)), Traits::kThreads, Traits::kSharedBytes, stream,
                p);
}

}  // namespace sample_attention

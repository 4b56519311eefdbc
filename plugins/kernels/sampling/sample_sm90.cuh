// The two scoring passes of `residue` and `tile` for sm_90a: row log-sum-exp, then block mass.
//
// Both are Q K^T over strided slices without a P V product. A work item is 256 slice rows (two consumer warpgroups of two 64-row products each).
//   Pass kRows : one slice per item, all of its key tiles; keeps a running maximum and sum for each row.
//   Pass kMass : residue: one key tile per item, all slices; keeps the sum over slices of exp2(score - lse) * weight in registers, so that the reduction
//                over the rows of a tile and the keys of a block happens once per item. tile: as kRows, with that reduction at each key tile.
//                No atomics: the result does not depend on the order of work.
// The producer announces a segment (one query tile and the key tiles that meet it) with each query load.
#pragma once

#include "../common/gmma.cuh"
#include "../common/launch.cuh"
#include "../common/logits.cuh"
#include "../common/pipeline.cuh"
#include "../common/ptx.cuh"
#include "sample_params.h"

#include <cuda_runtime_api.h>
#include <cute/tensor.hpp>

namespace sample_attention {

enum class Pass { kRows, kMass };

template <class Element_, int kHeadDim_, Pass kPass_>
struct SampleTraits {
  using Element = Element_;
  static constexpr Pass kPass = kPass_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kSampleRows;
  static constexpr int kBlockN = 128;
  // D = 128: 2 x 64 KiB of queries and 2 x 32 KiB of keys. D = 256 fits one of each.
  static constexpr int kQueryStages = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kStages = kHeadDim <= 128 ? 2 : 1;
  // A key tile's stage is given back before its last exponentials read the weights: one more stage keeps those from being overwritten.
  static constexpr int kWeightStages = kStages + 1;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kMaxTiles = 128 / 4;        // of a warpgroup: at least 4 slice rows a query tile
  static constexpr int kMaxColumns = kBlockN / 2;  // at least 2 slice keys a key block

  using Atoms = SmemAtoms<Element, kHeadDim>;
  static constexpr int kSlab = Atoms::kSlab;
  static constexpr int kSlabs = Atoms::kSlabs;
  using LayoutQ = decltype(cute::tile_to_shape(typename Atoms::RowMajor{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>, cute::Int<kQueryStages>>{}));
  using LayoutK = decltype(cute::tile_to_shape(typename Atoms::RowMajor{}, cute::Shape<cute::Int<kBlockN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using Mma =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::Int<128>, cute::Int<kBlockN>, cute::Int<kHeadDim>>>(),
                                    cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));

  struct Segment {
    int32_t batch, head, group, slice;
    int32_t key_tile, key_tiles;  // key_tiles < 0: no more work
    int32_t last;                 // its masses are complete after each of its key tiles (kMass)
  };

  struct Shared {
    alignas(1024) Element query[cute::cosize_v<LayoutQ>];
    alignas(1024) Element key[cute::cosize_v<LayoutK>];
    alignas(128) float lse[kQueryStages][kPass == Pass::kMass ? kRows : 1];
    alignas(128) float weight[kWeightStages][kPass == Pass::kMass ? kBlockN : 1];
    float sums[kConsumers][kPass == Pass::kMass ? kMaxTiles * kMaxColumns : 1];
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t key_full[kStages], key_empty[kStages];
    Segment segment[kQueryStages];
  };
  static constexpr uint32_t kQueryBytes = kRows * kHeadDim * sizeof(Element) + (kPass == Pass::kMass ? kRows * sizeof(float) : 0);
  static constexpr uint32_t kStageBytes = kBlockN * kHeadDim * sizeof(Element) + (kPass == Pass::kMass ? kBlockN * sizeof(float) : 0);
};

namespace sample_detail {

// One slice of one row group, in slice coordinates.
struct Slice {
  int row0, row_limit;  // slice rows row0 .. row_limit - 1 exist (row_limit <= row0: none)
  int row_residue, key_residue;
  int key_low, key_high;  // slice keys that are real: key_low .. key_high
  int first_real, last_real, shift;

  __device__ __forceinline__ Slice(const SampleParams &p, int batch, int group, int slice) {
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
    first_real = 0;
    last_real = p.keys;
    if (p.bounds != nullptr) {
      first_real = max(p.bounds[2 * batch], 0);
      last_real = min(p.bounds[2 * batch + 1], p.keys);
    }
    key_low = max((first_real - key_residue + (1 << p.key_log2) - 1) >> p.key_log2, 0);
    key_high = (last_real - 1 - key_residue) >> p.key_log2;
  }

  __device__ __forceinline__ int position(const SampleParams &p, int row) const { return shift + row_residue + (row << p.row_log2); }

  // Last slice key that a row may see.
  __device__ __forceinline__ int key_end(const SampleParams &p, int row) const { return min((position(p, row) - key_residue) >> p.key_log2, key_high); }
};

__device__ __forceinline__ bool full_head(const SampleParams &p, int head) { return (p.alpha != nullptr ? p.alpha[head] : p.alpha_all) >= 1.f; }

// Position of the last row of a group, over all slices.
__device__ __forceinline__ int group_end(const SampleParams &p, int group) {
  int tiles_before = group >= p.full_groups ? p.tiles : min((group + 1) * (kSampleRows >> p.tile_rows_log2), p.tiles);
  int rows = (p.first_tile + tiles_before) << (p.tile_rows_log2 + p.row_log2);
  return p.keys - p.queries + min(rows, p.queries) - 1;
}

template <class Traits>
__device__ __forceinline__ void produce(const SampleParams &p, typename Traits::Shared &shared) {
  using namespace cute;
  constexpr bool kMass = Traits::kPass == Pass::kMass;
  constexpr int kBlockN = Traits::kBlockN;
  const int lane = threadIdx.x % 32;
  const int group_heads = p.heads / p.kv_heads;
  const int key_groups = (((p.keys - 1) >> p.key_log2) + kBlockN) / kBlockN;  // of the longest slice
  const bool by_slice = !kMass || p.classes == 1;                             // an item is one slice with all its key tiles
  const int inner = by_slice ? p.classes : key_groups;
  const int per_kv = group_heads * inner * p.groups;
  const int items = p.batch * p.kv_heads * per_kv;
  typename Traits::LayoutQ layout_q;
  typename Traits::LayoutK layout_k;
  Ring<Traits::kStages> key_ring;
  Ring<Traits::kWeightStages> weight_ring;
  Ring<Traits::kQueryStages> query_ring;

  auto load_queries = [&](const Slice &slice, typename Traits::Segment segment) {
    int stage = query_ring.stage;
    ptx::barrier_wait(&shared.query_empty[stage], query_ring.parity ^ 1);
    if (lane == 0) {
      shared.segment[stage] = segment;
      ptx::barrier_arrive_expect(&shared.query_full[stage], Traits::kQueryBytes);
      const CUtensorMap *map = slice.row_residue < p.query.longer_count ? &p.query.longer : &p.query.shorter;
      CUTE_UNROLL
      for (int slab = 0; slab < Traits::kSlabs; ++slab) {
        ptx::load_5d(map, &shared.query_full[stage], shared.query + layout_q(0, slab * Traits::kSlab, stage), slab * Traits::kSlab, slice.row_residue,
                     slice.row0, segment.head, segment.batch);
      }
      if constexpr (kMass) {
        int64_t row = ((int64_t(segment.batch) * p.heads + segment.head) * p.classes + segment.slice) * p.groups + segment.group;
        ptx::load_bulk(&shared.query_full[stage], shared.lse[stage], p.lse + row * kSampleRows, kSampleRows * sizeof(float));
      }
    }
    __syncwarp();
    query_ring.advance();
  };
  auto load_keys = [&](const Slice &slice, int batch, int kv_head, int tile) {
    int stage = key_ring.stage;
    ptx::barrier_wait(&shared.key_empty[stage], key_ring.parity ^ 1);
    if (lane == 0) {
      ptx::barrier_arrive_expect(&shared.key_full[stage], Traits::kStageBytes);
      const CUtensorMap *map = slice.key_residue < p.key.longer_count ? &p.key.longer : &p.key.shorter;
      CUTE_UNROLL
      for (int slab = 0; slab < Traits::kSlabs; ++slab) {
        ptx::load_5d(map, &shared.key_full[stage], shared.key + layout_k(0, slab * Traits::kSlab, stage), slab * Traits::kSlab, slice.key_residue,
                     tile * kBlockN, kv_head, batch);
      }
      if constexpr (kMass) {
        int64_t row = ((int64_t(batch) * p.kv_heads + kv_head) << p.key_log2) + slice.key_residue;
        ptx::load_bulk(&shared.key_full[stage], shared.weight[weight_ring.stage], p.weight + row * p.weight_row + tile * kBlockN, kBlockN * sizeof(float));
      }
    }
    __syncwarp();
    key_ring.advance();
    weight_ring.advance();
  };

  int item = blockIdx.x;
  while (item < items) {
    int next = 0;
    if (lane == 0) next = gridDim.x + atomicAdd(p.ticket, 1);
    const int kv = item / per_kv, rest = item % per_kv;
    const int batch = kv / p.kv_heads, kv_head = kv % p.kv_heads;
    const int head = kv_head * group_heads + rest % group_heads;
    const int inner_index = rest / group_heads % inner;
    const int group = p.groups - 1 - rest / (group_heads * inner);  // the longest rows first
    const bool beyond = !by_slice && ((inner_index * kBlockN) << p.key_log2) > group_end(p, group);
    if (!full_head(p, head) && !beyond) {
      if (!by_slice) {
        for (int c = 0; c < p.classes; ++c) {
          const Slice slice(p, batch, group, c);
          load_queries(slice, {batch, head, group, c, inner_index, 1, c == p.classes - 1});
          load_keys(slice, batch, kv_head, inner_index);
        }
      } else {
        const Slice slice(p, batch, group, inner_index);
        int first = slice.key_low / kBlockN, tiles = 0;
        if (slice.row_limit > slice.row0) {
          int end = slice.key_end(p, min(slice.row_limit, slice.row0 + kSampleRows) - 1);
          if (end >= slice.key_low) tiles = end / kBlockN + 1 - first;
        }
        // Every block that begins at or before the last row gets its mass, zeros included.
        if (kMass) first = 0, tiles = group_end(p, group) / kBlockN + 1;
        load_queries(slice, {batch, head, group, inner_index, first, tiles, 1});
        for (int n = 0; n < tiles; ++n) load_keys(slice, batch, kv_head, first + n);
      }
    }
    item = __shfl_sync(~0u, next, 0);
  }
  ptx::barrier_wait(&shared.query_empty[query_ring.stage], query_ring.parity ^ 1);
  if (lane == 0) {
    shared.segment[query_ring.stage].key_tiles = -1;
    ptx::barrier_arrive(&shared.query_full[query_ring.stage]);
  }
}

// Sums the block masses of one key tile over the rows of each query tile and the keys of each block, and stores them. Leaves mass at zero.
template <class Traits>
__device__ __forceinline__ void store_mass(const SampleParams &p, typename Traits::Shared &shared, const typename Traits::Segment &segment, int key_tile,
                                           float (&mass)[2][2][Traits::kBlockN / 8], int thread) {
  constexpr int kBlockN = Traits::kBlockN;
  static_assert(kBlockN == 128);
  // A query tile has at most 64 slice rows, so it lies in one warpgroup: the two do not wait for each other.
  const int consumer = thread / 128, flush = 3 + consumer;
  const int lane = thread % 32;
  const int warp_row = thread % 128 / 32 * 16 + lane / 4;
  float *sums = shared.sums[consumer];
  const int rows_log2 = min(p.tile_rows_log2, 4);  // slice rows that one warp sums; the rows of a query tile are 4 to 64
  const int warps_log2 = p.tile_rows_log2 - rows_log2;
  const int keys_log2 = p.block_keys_log2;                    // 1 .. 7
  const int columns_log2 = 7 - keys_log2;                     // blocks of a key tile
  const int fold = keys_log2 > 3 ? 1 << (keys_log2 - 3) : 1;  // groups of 8 columns that lie in one block
  ptx::named_sync(flush, 128);                                // the readers of the item before are done
  CUTE_UNROLL
  for (int m = 0; m < 2; ++m) {
    CUTE_UNROLL
    for (int level = 0; level < 4; ++level) {
      if (keys_log2 > 3 + level) {
        CUTE_UNROLL
        for (int j = 0; j < kBlockN / 8; j += 2 << level) {
          mass[m][0][j] += mass[m][0][j + (1 << level)];
          mass[m][1][j] += mass[m][1][j + (1 << level)];
        }
      }
    }
    CUTE_UNROLL
    for (int j = 0; j < kBlockN / 8; ++j) {
      if ((j & (fold - 1)) == 0) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          float v = mass[m][r][j];
          if (rows_log2 == 4) v += mass[m][1 - r][j];
          v += __shfl_xor_sync(~0u, v, 4);
          v += __shfl_xor_sync(~0u, v, 8);
          if (rows_log2 > 2) v += __shfl_xor_sync(~0u, v, 16);
          if (keys_log2 > 1) v += __shfl_xor_sync(~0u, v, 1);
          if (keys_log2 > 2) v += __shfl_xor_sync(~0u, v, 2);
          int row = m * 64 + warp_row + 8 * r;  // of the warpgroup's 128
          int column = 8 * j + (lane % 4) * 2;
          if ((row & ((1 << rows_log2) - 1)) == 0 && (column & ((1 << keys_log2) - 1)) == 0) {
            sums[((row >> rows_log2) << columns_log2) + (column >> keys_log2)] = v;
          }
        }
      }
    }
    CUTE_UNROLL
    for (int j = 0; j < kBlockN / 8; ++j) mass[m][0][j] = mass[m][1][j] = 0.f;
  }
  ptx::named_sync(flush, 128);
  const bool cut = segment.group >= p.full_groups;
  const int first_block = (key_tile * kBlockN) >> keys_log2;
  const int first_tile = (cut ? p.full_rows : segment.group * kSampleRows) >> p.tile_rows_log2;
  const int end_tile = cut ? p.tiles : p.full_rows >> p.tile_rows_log2;  // the tile that is cut short belongs to its own group alone
  const int64_t head_row = (int64_t(segment.batch) * p.heads + segment.head) * p.tiles;
  for (int e = thread % 128; e < (128 >> p.tile_rows_log2) << columns_log2; e += 128) {
    const int column = e & ((1 << columns_log2) - 1), own = e >> columns_log2, row = own << p.tile_rows_log2;
    const int tile = first_tile + ((row / 64 * 128 + consumer * 64 + row % 64) >> p.tile_rows_log2), block = first_block + column;
    float v = 0.f;
    for (int w = 0; w < 1 << warps_log2; ++w) v += sums[(((own << warps_log2) + w) << columns_log2) + column];
    if (tile < end_tile && block < p.blocks) p.mass[(head_row + tile) * p.blocks + block] = v;
  }
}

template <class Traits>
__device__ __forceinline__ void consume(const SampleParams &p, typename Traits::Shared &shared) {
  using namespace cute;
  constexpr bool kMass = Traits::kPass == Pass::kMass;
  constexpr int kBlockN = Traits::kBlockN;
  enum { kTurn = 1 };  // named barriers; 0 is __syncthreads, 3 and 4 are store_mass's
  const int thread = threadIdx.x - 128;
  const int lane = thread % 32;
  const int consumer = thread / 128;
  const int row_in_tile = (thread / 32) * 16 + lane / 4;  // of the first 128 rows; 8 below and 128 below follow
  const int pair = (lane % 4) * 2;
  const LogitScale logit(p.scale, p.softcap);

  Tensor sQ = make_tensor(make_smem_ptr(shared.query), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(shared.key), typename Traits::LayoutK{});
  typename Traits::Mma mma;
  using Half = Shape<Int<128>, Int<Traits::kHeadDim>>;
  auto fUpper = operand_a(mma, consumer, local_tile(sQ, Half{}, make_coord(_0{}, _0{}, _)));
  auto fLower = operand_a(mma, consumer, local_tile(sQ, Half{}, make_coord(_1{}, _0{}, _)));
  auto fK = operand_b(mma, consumer, sK);
  Tensor upper = partition_fragment_C(mma, Shape<Int<128>, Int<kBlockN>>{});
  Tensor lower = partition_fragment_C(mma, Shape<Int<128>, Int<kBlockN>>{});
  static_assert(decltype(size(upper))::value == kBlockN / 2);

  Ring<Traits::kStages> key_ring;
  Ring<Traits::kWeightStages> weight_ring;
  Ring<Traits::kQueryStages> query_ring;
  float mass[2][2][kBlockN / 8];
  float row_max[2][2], row_sum[2][2];
  CUTE_UNROLL
  for (int e = 0; e < 4 * (kBlockN / 8); ++e) (&mass[0][0][0])[e] = 0.f;

  // The consumers take turns at issuing: one's exponentials then run under the other's products instead of both waiting for the same pipe.
  auto issue = [&] {
    const int query_stage = query_ring.stage, key_stage = key_ring.stage;
    ptx::barrier_wait(&shared.key_full[key_stage], key_ring.parity);
    ptx::named_sync(kTurn + consumer, 256);
    issue_gemm<true>(mma, stage_of(fUpper, query_stage), stage_of(fK, key_stage), upper);
    issue_gemm<true>(mma, stage_of(fLower, query_stage), stage_of(fK, key_stage), lower);
    ptx::named_arrive(kTurn + (consumer ^ 1), 256);
  };
  auto next_segment = [&] {
    ptx::barrier_wait(&shared.query_full[query_ring.stage], query_ring.parity);
    return shared.segment[query_ring.stage];
  };
  auto release = [&](uint64_t &empty) {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&empty);
  };

  if (consumer == 1) ptx::named_arrive(kTurn + 0, 256);  // the first turn is consumer 0's
  for (auto segment = next_segment(); segment.key_tiles >= 0; segment = next_segment()) {
    const Slice slice(p, segment.batch, segment.group, segment.slice);
    int key_end[2][2];
    float lse[2][2];
    CUTE_UNROLL
    for (int m = 0; m < 2; ++m) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        int row = m * 128 + row_in_tile + 8 * r;
        key_end[m][r] = slice.key_end(p, slice.row0 + row);
        if constexpr (kMass) {
          lse[m][r] = shared.lse[query_ring.stage][row];
        } else {
          row_max[m][r] = -INFINITY;
          row_sum[m][r] = 0.f;
        }
      }
    }
    const int every_row_end = slice.key_end(p, slice.row0);

    auto score = [&](auto &scores, int m, int first_key) {
      if (logit.capped()) {
        CUTE_UNROLL
        for (int e = 0; e < size(scores); ++e) scores(e) = logit.cap(scores(e));
      }
      if (first_key < slice.key_low || first_key + kBlockN - 1 > every_row_end) {
        CUTE_UNROLL
        for (int e = 0; e < size(scores); ++e) {
          int key = first_key + 8 * (e / 4) + pair + e % 2;
          if (key < slice.key_low || key > key_end[m][(e / 2) % 2]) scores(e) = -INFINITY;
        }
      }
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        if constexpr (kMass) {
          CUTE_UNROLL
          for (int j = 0; j < kBlockN / 8; ++j) {
            const float2 w = *reinterpret_cast<const float2 *>(&shared.weight[weight_ring.stage][8 * j + pair]);
            float v = mass[m][r][j];
            v = fmaf(ptx::exp2_fast(fmaf(scores(2 * r + 4 * j), logit.multiplier, -lse[m][r])), w.x, v);
            mass[m][r][j] = fmaf(ptx::exp2_fast(fmaf(scores(1 + 2 * r + 4 * j), logit.multiplier, -lse[m][r])), w.y, v);
          }
        } else {
          // Each thread keeps its own columns' maximum: the four threads of a row meet once, at the end.
          float peak = row_max[m][r];
          CUTE_UNROLL
          for (int j = 0; j < kBlockN / 8; ++j) peak = fmaxf(peak, fmaxf(scores(2 * r + 4 * j), scores(1 + 2 * r + 4 * j)));
          float shift = peak == -INFINITY ? 0.f : peak * logit.multiplier;
          float sum = row_sum[m][r] * ptx::exp2_fast(row_max[m][r] * logit.multiplier - shift);
          row_max[m][r] = peak;
          CUTE_UNROLL
          for (int j = 0; j < kBlockN / 8; ++j) {
            sum += ptx::exp2_fast(fmaf(scores(2 * r + 4 * j), logit.multiplier, -shift));
            sum += ptx::exp2_fast(fmaf(scores(1 + 2 * r + 4 * j), logit.multiplier, -shift));
          }
          row_sum[m][r] = sum;
        }
      }
    };

    for (int n = 0; n < segment.key_tiles; ++n) {
      const int first_key = (segment.key_tile + n) * kBlockN;
      issue();
      gemm_wait<1>();
      gemm_fence(upper);
      score(upper, 0, first_key);
      gemm_wait<0>();
      gemm_fence(lower);
      release(shared.key_empty[key_ring.stage]);
      key_ring.advance();
      if (n + 1 == segment.key_tiles) release(shared.query_empty[query_ring.stage]);
      score(lower, 1, first_key);
      if constexpr (kMass) {
        weight_ring.advance();
        if (segment.last) store_mass<Traits>(p, shared, segment, segment.key_tile + n, mass, thread);
      }
    }
    if (segment.key_tiles == 0) release(shared.query_empty[query_ring.stage]);

    if constexpr (!kMass) {
      int64_t out = (((int64_t(segment.batch) * p.heads + segment.head) * p.classes + segment.slice) * p.groups + segment.group) * kSampleRows;
      CUTE_UNROLL
      for (int m = 0; m < 2; ++m) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          float peak = row_max[m][r];
          peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
          peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
          float shift = peak == -INFINITY ? 0.f : peak * logit.multiplier;
          float sum = row_sum[m][r] * ptx::exp2_fast(row_max[m][r] * logit.multiplier - shift);
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          int row = m * 128 + row_in_tile + 8 * r;
          int position = slice.position(p, slice.row0 + row);
          bool real = slice.row0 + row < slice.row_limit && position >= slice.first_real && position < slice.last_real;
          if (lane % 4 == 0) p.lse[out + row] = real && sum != 0.f ? shift + log2f(sum) : INFINITY;
        }
      }
    }
    query_ring.advance();
  }
}

}  // namespace sample_detail

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) sample_kernel(const __grid_constant__ SampleParams p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Traits::kQueryStages; ++s) {
      ptx::barrier_init(&shared.query_full[s], 1);
      ptx::barrier_init(&shared.query_empty[s], 4 * Traits::kConsumers);
    }
    for (int s = 0; s < Traits::kStages; ++s) {
      ptx::barrier_init(&shared.key_full[s], 1);
      ptx::barrier_init(&shared.key_empty[s], 4 * Traits::kConsumers);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_decrease<24>();
    if (threadIdx.x < 32) sample_detail::produce<Traits>(p, shared);
  } else {
    ptx::registers_increase<240>();
    sample_detail::consume<Traits>(p, shared);
  }
}

template <class Traits>
cudaError_t launch_sample(const SampleParams &p, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Traits::Shared);
  static_assert(kBytes <= 227 * 1024, "an sm_90 thread block has 227 KiB of shared memory");
  return launch(sample_kernel<Traits>, dim3(multiprocessors), Traits::kThreads, kBytes, stream, p);
}

}  // namespace sample_attention

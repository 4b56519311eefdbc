// Scoring for `residue` and `tile` on sm_90a: one pass of Q K^T over strided slices, without a P V product.
//
// A work item is 256 slice rows (four consumer warpgroups of one 64-row product each) against up to kSampleTileLimit key tiles of 128 slice keys. Each key tile
// leaves, for each row, the weighted sums of its exponentials over key blocks in a table; each item leaves its rows' log-sum-exps. The normaliser of a row is
// known only when all of its items are done, so reduce.cu applies it and sums over rows. Keeping the sums costs 16 bits for each block of a row and saves the
// second pass of products and exponentials. No atomics: the result does not depend on the order of work.
#pragma once

#include "../common/gmma.cuh"
#include "../common/launch.cuh"
#include "../common/logits.cuh"
#include "../common/pack.cuh"
#include "../common/pipeline.cuh"
#include "../common/ptx.cuh"
#include "slice.cuh"

#include <cuda_runtime_api.h>
#include <cute/tensor.hpp>

namespace sample_attention {

// kFold: log2 of the slice keys of a block inside one key tile where the code is made for one number of them; 0: any, looked up at run time.
template <class Element_, int kHeadDim_, int kFold_>
struct SampleTraits {
  static constexpr int kFold = kFold_;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kSampleRows;
  static constexpr int kBlockN = kSampleKeys;
  // D = 128: 2 x 64 KiB of queries and 2 x 32 KiB of keys. D = 256 fits one of each.
  static constexpr int kQueryStages = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kStages = kHeadDim <= 128 ? 2 : 1;
  // A key tile's stage is given back before its last exponentials read the weights: one more stage keeps those from being overwritten.
  static constexpr int kWeightStages = kStages + 1;
  static constexpr int kConsumers = 4;
  static constexpr int kThreads = 128 * (kConsumers + 1);
#ifdef SA_EVERY_LANE_ARRIVES  // for compute-sanitizer: racecheck does not see that __syncwarp puts the reads of all lanes before lane 0's arrival
  static constexpr int kArrivals = 32;
#else
  static constexpr int kArrivals = 1;
#endif

  using Atoms = SmemAtoms<Element, kHeadDim>;
  static constexpr int kSlab = Atoms::kSlab;
  static constexpr int kSlabs = Atoms::kSlabs;
  using LayoutQ = decltype(cute::tile_to_shape(typename Atoms::RowMajor{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>, cute::Int<kQueryStages>>{}));
  using LayoutK = decltype(cute::tile_to_shape(typename Atoms::RowMajor{}, cute::Shape<cute::Int<kBlockN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using Mma =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::Int<64>, cute::Int<kBlockN>, cute::Int<kHeadDim>>>(),
                                    cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));

  struct Segment {
    int32_t local_head, group, slice, split;
    int32_t key_tile, key_tiles;  // key_tiles < 0: no more work
  };

  struct Shared {
    alignas(1024) Element query[cute::cosize_v<LayoutQ>];
    alignas(1024) Element key[cute::cosize_v<LayoutK>];
    alignas(16) float weight[kWeightStages][kBlockN];
    float weight_undo[kWeightStages];  // base-2 exponent, see scale_weights
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t key_full[kStages], key_empty[kStages];
    Segment segment[kQueryStages];
  };
  static constexpr uint32_t kQueryBytes = kRows * kHeadDim * sizeof(Element);
  static constexpr uint32_t kStageBytes = kBlockN * kHeadDim * sizeof(Element);
};

namespace sample_detail {

// Leaves the weights of a warp's 128 keys (four of a lane) under the power of two that brings the largest into [1/4, 1/2), and returns the base-2 exponent that
// undoes it. Pairs of keys lie as a consumer reads them: for even j those of columns 8 j + 2 c and, beside them, 8 (j + 1) + 2 c.
__device__ __forceinline__ float scale_weights(const float4 &w, float *target, int lane) {
  float top = fmaxf(fmaxf(w.x, w.y), fmaxf(w.z, w.w));
#pragma unroll
  for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  const int exponent = min(max(int(__float_as_uint(top) >> 23), 1), 250);  // of a value that is not negative; inf and NaN stay what they are
  const float factor = __uint_as_float(uint32_t(252 - exponent) << 23);
  float2 *pairs = reinterpret_cast<float2 *>(target) + lane / 4 * 8 + lane % 2 * 4 + lane / 2 % 2;
  pairs[0] = make_float2(w.x * factor, w.y * factor);
  pairs[2] = make_float2(w.z * factor, w.w * factor);
  return float(exponent - 125);
}

template <class Traits>
__device__ __forceinline__ void produce(const SampleParams &p, typename Traits::Shared &shared) {
  using namespace cute;
  const int lane = threadIdx.x % 32;
  const int unit_items = p.head_unit * p.classes * p.groups * p.splits;
  const int items = p.head_count / p.head_unit * unit_items;
  const int group_heads = p.heads / p.kv_heads;
  typename Traits::LayoutQ layout_q;
  typename Traits::LayoutK layout_k;
  Ring<Traits::kStages> key_ring;
  Ring<Traits::kWeightStages> weight_ring;
  Ring<Traits::kQueryStages> query_ring;

  int item = blockIdx.x;
  while (item < items) {
    int next = 0;
    if (lane == 0) next = gridDim.x + atomicAdd(p.ticket, 1);
    int rest = item % unit_items;
    const int local_head = item / unit_items * p.head_unit + rest % p.head_unit;
    rest /= p.head_unit;
    // The longest items first: whole splits before the last ones of each row, and there the longest rows.
    const int class_index = rest % p.classes, group = p.groups - 1 - rest / p.classes % p.groups, split = rest / (p.classes * p.groups);
    const int head = (p.first_head + local_head) % p.heads, batch = (p.first_head + local_head) / p.heads, kv_head = head / group_heads;
    const RealKeys real(p, batch);
    const KeyTiles all(p, real, group);
    const int begin = split * kSampleTileLimit;
    if (!full_head(p, head) && (split == 0 || begin < all.count)) {
      const Slice slice(p, real, group, class_index);
      const int first = all.first + begin, tiles = min(all.count - begin, kSampleTileLimit);
      const int query_stage = query_ring.stage;
      ptx::barrier_wait(&shared.query_empty[query_stage], query_ring.parity ^ 1);
      if (lane == 0) {
        shared.segment[query_stage] = {local_head, group, class_index, split, first, tiles};
        ptx::barrier_arrive_expect(&shared.query_full[query_stage], Traits::kQueryBytes);
        const CUtensorMap *map = slice.row_residue < p.query.longer_count ? &p.query.longer : &p.query.shorter;
        CUTE_UNROLL
        for (int slab = 0; slab < Traits::kSlabs; ++slab) {
          ptx::load_5d(map, &shared.query_full[query_stage], shared.query + layout_q(0, slab * Traits::kSlab, query_stage), slab * Traits::kSlab,
                       slice.row_residue, slice.row0, head, batch);
        }
      }
      __syncwarp();
      query_ring.advance();

      const CUtensorMap *map = slice.key_residue < p.key.longer_count ? &p.key.longer : &p.key.shorter;
      const float *weight = p.weight + (((int64_t(batch) * p.kv_heads + kv_head) << p.key_log2) + slice.key_residue) * p.weight_row;
      for (int tile = first; tile < first + tiles; ++tile) {
        const int stage = key_ring.stage;
        const float4 w = reinterpret_cast<const float4 *>(weight + tile * Traits::kBlockN)[lane];
        ptx::barrier_wait(&shared.key_empty[stage], key_ring.parity ^ 1);
        if (lane == 0) {
          ptx::barrier_arrive_expect(&shared.key_full[stage], Traits::kStageBytes);
          CUTE_UNROLL
          for (int slab = 0; slab < Traits::kSlabs; ++slab) {
            ptx::load_5d(map, &shared.key_full[stage], shared.key + layout_k(0, slab * Traits::kSlab, stage), slab * Traits::kSlab, slice.key_residue,
                         tile * Traits::kBlockN, kv_head, batch);
          }
        }
        const float undo = scale_weights(w, shared.weight[weight_ring.stage], lane);
        if (lane == 0) shared.weight_undo[weight_ring.stage] = undo;
        __syncwarp();
        if (lane < Traits::kArrivals) ptx::barrier_arrive(&shared.key_full[stage]);
        key_ring.advance();
        weight_ring.advance();
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

constexpr int kPairs = kSampleKeys / 8;  // of neighbouring keys, of a thread in one row: pair j is columns 8 j + 2 (lane % 4) and the next

// What the keys of one key tile give to the blocks of a thread's two rows: add() is called for each pair of keys in turn, with the exponentials of both rows,
// then store(). low and high are the rows of the table; reduce.cu knows the order of the slots.
template <int kFold>
class RowBlocks;

// Any size of block but the next two, slots in the order of the blocks: one at a time, by the lanes of a row together.
template <>
class RowBlocks<0> {
 public:
  __device__ __forceinline__ RowBlocks(uint16_t *low, uint16_t *high, int keys_log2, int lane)
      : row_(lane % 2 == 0 ? low : high), keys_log2_(keys_log2), part_(lane % 4) {}

  __device__ __forceinline__ void add(int j, float2 low, float2 high, float2 w) {
    const int last = (1 << max(keys_log2_ - 3, 0)) - 1;  // pairs of a lane in a block, less one
    float pair[2] = {fmaf(low.x, w.x, low.y * w.y), fmaf(high.x, w.x, high.y * w.y)};
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) v_[r] = (j & last) == 0 ? pair[r] : v_[r] + pair[r];
    if ((j & last) != last) return;
    // Lane 2 i has the low row's sum of its pair and the next lane's, lane 2 i + 1 the high row's.
    const bool upper = part_ % 2 != 0;
    const float own = upper ? v_[1] : v_[0], other = __shfl_xor_sync(~0u, upper ? v_[0] : v_[1], 1);
    if (keys_log2_ == 1) {
      *reinterpret_cast<uint32_t *>(row_ + 4 * j + part_ / 2 * 2) = upper ? pack<cute::half_t>(other, own) : pack<cute::half_t>(own, other);
    } else {
      float sum = own + other;
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (part_ < 2) row_[j >> (keys_log2_ - 3)] = static_cast<uint16_t>(pack<cute::half_t>(sum, 0.f));
    }
  }
  __device__ __forceinline__ void store() {}

 private:
  uint16_t *row_;
  int keys_log2_, part_;
  float v_[2];
};

// `residue` with 16 slices and blocks of 64: four slice keys a block, two pairs in neighbouring lanes. Both rows travel in one register, and each lane stores
// eight blocks of a row at once.
template <>
class RowBlocks<2> {
 public:
  __device__ __forceinline__ RowBlocks(uint16_t *low, uint16_t *high, int, int lane)
      : row_{low + 8 * (lane % 4), high + 8 * (lane % 4)}, upper_(lane % 2 != 0) {}

  __device__ __forceinline__ void add(int j, float2 low, float2 high, float2 w) {
    const __half2 pair = __floats2half2_rn(fmaf(low.x, w.x, low.y * w.y), fmaf(high.x, w.x, high.y * w.y));
    if (j % 2 == 0) {
      even_ = pair;
    } else {
      v_[j / 2] = __hadd2(upper_ ? pair : even_, __shfl_xor_sync(~0u, upper_ ? even_ : pair, 1));
    }
  }
  __device__ __forceinline__ void store() {
    __half2 word[2][4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      word[0][i] = __lows2half2(v_[2 * i], v_[2 * i + 1]);
      word[1][i] = __highs2half2(v_[2 * i], v_[2 * i + 1]);
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) *reinterpret_cast<uint4 *>(row_[r]) = *reinterpret_cast<const uint4 *>(word[r]);
  }

 private:
  uint16_t *row_[2];
  bool upper_;
  __half2 v_[kPairs / 2], even_;
};

// `tile` with blocks of 64.
template <>
class RowBlocks<6> {
 public:
  __device__ __forceinline__ RowBlocks(uint16_t *low, uint16_t *high, int, int lane) : row_{low, high}, first_(lane % 4 == 0) {}

  __device__ __forceinline__ void add(int j, float2 low, float2 high, float2 w) {
    const int block = j / (kPairs / 2);
    const bool first = j % (kPairs / 2) == 0;
    v_[0][block] = fmaf(low.x, w.x, first ? low.y * w.y : fmaf(low.y, w.y, v_[0][block]));
    v_[1][block] = fmaf(high.x, w.x, first ? high.y * w.y : fmaf(high.y, w.y, v_[1][block]));
  }
  __device__ __forceinline__ void store() {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        v_[r][i] += __shfl_xor_sync(~0u, v_[r][i], 1);
        v_[r][i] += __shfl_xor_sync(~0u, v_[r][i], 2);
      }
      if (first_) *reinterpret_cast<uint32_t *>(row_[r]) = pack<cute::half_t>(v_[r][0], v_[r][1]);
    }
  }

 private:
  uint16_t *row_[2];
  bool first_;
  float v_[2][2];
};

// The exponentials of a row are taken against a reference that makes its largest score at that time 2^kTop, and that is kept until a score outgrows it by
// 2^kSlack. Weights are below 1/2: an entry of the table, of at most 2^fold keys, stays within binary16, and what lies within 2^-20 of the largest keeps its 11
// bits.
template <int kFold>
struct Reference {
  static constexpr float kTop = kFold == 2 ? 10.f : 6.f;
  static constexpr float kSlack = kFold == 2 ? 4.f : 3.f;
};

template <class Traits>
__device__ __forceinline__ void consume(const SampleParams &p, typename Traits::Shared &shared) {
  using namespace cute;
  constexpr int kBlockN = Traits::kBlockN;
  const int thread = threadIdx.x - 128;
  const int lane = thread % 32;
  const int consumer = __shfl_sync(~0u, thread / 128, 0);  // what descriptors are made of is the same in a warp, and the compiler has to see it
  const int row_in_group = (thread / 32) * 16 + lane / 4;  // 8 below follows
  const int pair = (lane % 4) * 2;
  const LogitScale logit(p.scale, p.softcap);
  using Ref = Reference<Traits::kFold>;
  const float slack = Ref::kSlack / logit.multiplier;  // before scaling

  typename Traits::Mma mma;
  auto fQ = operand_a(mma, consumer, make_tensor(make_smem_ptr(shared.query), typename Traits::LayoutQ{}));
  auto fK = operand_b(mma, consumer, make_tensor(make_smem_ptr(shared.key), typename Traits::LayoutK{}));
  Tensor scores = partition_fragment_C(mma, Shape<Int<Traits::kRows>, Int<kBlockN>>{});
  static_assert(decltype(size(scores))::value == kBlockN / 2);

  Ring<Traits::kStages> key_ring;
  Ring<Traits::kWeightStages> weight_ring;
  Ring<Traits::kQueryStages> query_ring;
  const int slots_log2 = Traits::kFold > 0 ? 7 - Traits::kFold : sample_slots_log2(p.block_keys_log2);

  while (true) {
    const int query_stage = query_ring.stage;
    ptx::barrier_wait(&shared.query_full[query_stage], query_ring.parity);
    const typename Traits::Segment &segment = shared.segment[query_stage];  // read where it is needed: registers are short
    const int key_tiles = segment.key_tiles;
    if (key_tiles < 0) break;
    auto slice_of = [&] { return Slice(p, RealKeys(p, (p.first_head + segment.local_head) / p.heads), segment.group, segment.slice); };
    int64_t row = table_row(p, segment.local_head, segment.slice, segment.group, segment.key_tile, row_in_group);  // of the table
    const int below = table_rows(p, 8);
    int open_low, open_high;  // key tiles in between need no mask
    int own_tiles;            // those behind lie beyond the last query of these rows, in every slice: nobody reads what the table has there
    {
      const Slice slice = slice_of();
      open_low = (slice.key_low + kBlockN - 1) / kBlockN - segment.key_tile;
      open_high = (slice.key_end(p, slice.row0 + consumer * 64) + 1) / kBlockN - 1 - segment.key_tile;
      const int rows_log2 = max(p.tile_rows_log2, 6);  // of the query tiles that these rows belong to
      const int row_end = (((consumer * 64) >> rows_log2) + 1) << rows_log2;
      const int position_end = slice.shift + ((slice.row0 + row_end) << p.row_log2);
      own_tiles = p.block_keys_log2 < 8 ? ((position_end - 1) >> p.key_log2) / kBlockN + 1 - segment.key_tile : key_tiles;
    }
    // The rows of this warp lie in query tiles that keep all blocks.
    const bool idle = [&] {
      const RealKeys real(p, (p.first_head + segment.local_head) / p.heads);
      const int first = slice_of().row0 + row_in_group / 16 * 16;
      return dense_tile(p, real, first >> p.tile_rows_log2) && dense_tile(p, real, (first + 15) >> p.tile_rows_log2);
    }();
    float peak[2], sum[2];  // of a row: the score that is 2^kTop (equal in its four lanes), and this lane's share of the sum of its exponentials
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      peak[r] = -INFINITY;
      sum[r] = 0.f;
    }

    auto score = [&](int n) {
      if (logit.capped()) {
        CUTE_UNROLL
        for (int e = 0; e < size(scores); ++e) scores(e) = logit.cap(scores(e));
      }
      if (n < open_low || n > open_high) {
        const Slice slice = slice_of();
        const int first_key = (segment.key_tile + n) * kBlockN + pair;
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int key_end = slice.key_end(p, slice.row0 + row_in_group + 8 * r);
          CUTE_UNROLL
          for (int j = 0; j < kPairs; ++j) {
            CUTE_UNROLL
            for (int i = 0; i < 2; ++i) {
              const int key = first_key + 8 * j + i;
              if (key < slice.key_low || key > key_end) scores(i + 2 * r + 4 * j) = -INFINITY;
            }
          }
        }
      }
      float top[2][2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        top[r][0] = scores(2 * r), top[r][1] = scores(1 + 2 * r);
        CUTE_UNROLL
        for (int j = 1; j < kPairs; ++j) {
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) top[r][i] = fmaxf(top[r][i], scores(i + 2 * r + 4 * j));
        }
        top[r][0] = fmaxf(top[r][0], top[r][1]);
      }
      if (__any_sync(~0u, top[0][0] > peak[0] + slack || top[1][0] > peak[1] + slack)) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          float most = fmaxf(top[r][0], peak[r]);
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
          if (most > peak[r]) sum[r] *= ptx::exp2_fast((peak[r] - most) * logit.multiplier);
          peak[r] = most;
        }
      }
      float shift[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) shift[r] = peak[r] == -INFINITY ? 0.f : fmaf(peak[r], logit.multiplier, -Ref::kTop);
      const float4 *weight = reinterpret_cast<const float4 *>(shared.weight[weight_ring.stage]) + lane % 4;
      RowBlocks<Traits::kFold> blocks(p.table + (row << slots_log2), p.table + ((row + below) << slots_log2), 7 - slots_log2, lane);
      constexpr int kBatch = 2;  // pairs whose exponentials are under way together: other warps fill in
      CUTE_UNROLL
      for (int first = 0; first < kPairs; first += kBatch) {
        CUTE_UNROLL
        for (int e = 4 * first; e < 4 * (first + kBatch); ++e) scores(e) = ptx::exp2_fast(fmaf(scores(e), logit.multiplier, -shift[e / 2 % 2]));
        CUTE_UNROLL
        for (int j = first; j < first + kBatch; j += 2) {
          const float4 w = weight[2 * j];
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float2 low = make_float2(scores(4 * (j + i)), scores(4 * (j + i) + 1)), high = make_float2(scores(4 * (j + i) + 2), scores(4 * (j + i) + 3));
            sum[0] += low.x + low.y;
            sum[1] += high.x + high.y;
            blocks.add(j + i, low, high, i == 0 ? make_float2(w.x, w.y) : make_float2(w.z, w.w));
          }
        }
      }
      blocks.store();
      if (lane % 4 == 0) {
        const float undo = shared.weight_undo[weight_ring.stage];
        p.reference[row] = shift[0] + undo;
        p.reference[row + below] = shift[1] + undo;
      }
    };

    for (int n = 0; n < key_tiles; ++n) {
      const int stage = key_ring.stage;
      ptx::barrier_wait(&shared.key_full[stage], key_ring.parity);
      if (n < own_tiles) {
        issue_gemm<true>(mma, stage_of(fQ, __shfl_sync(~0u, query_stage, 0)), stage_of(fK, __shfl_sync(~0u, stage, 0)), scores);
        gemm_wait<0>();
        gemm_fence(scores);
      }
      __syncwarp();
      if (lane < Traits::kArrivals) ptx::barrier_arrive(&shared.key_empty[stage]);
      key_ring.advance();
      if (n < own_tiles && !idle) score(n);
      weight_ring.advance();
      row += kSampleRows * p.classes;
    }

    const Slice slice = slice_of();
    const RealKeys real(p, (p.first_head + segment.local_head) / p.heads);
    float *lse = p.lse + lse_index(p, segment.local_head, segment.slice, segment.group, segment.split) * kSampleRows;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int own = row_in_group + 8 * r;
      const int position = slice.position(p, slice.row0 + own);
      const bool sampled = slice.row0 + own < slice.row_limit && position >= real.first && position < real.last && total != 0.f;
      if (lane % 4 == 0) lse[own] = sampled ? fmaf(peak[r], logit.multiplier, -Ref::kTop) + log2f(total) : INFINITY;
    }
    ptx::barrier_arrive(&shared.query_empty[query_stage]);
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
      ptx::barrier_init(&shared.query_empty[s], 128 * Traits::kConsumers);
    }
    for (int s = 0; s < Traits::kStages; ++s) {
      ptx::barrier_init(&shared.key_full[s], 1 + Traits::kArrivals);  // the copies are under way, and the weights are there
      ptx::barrier_init(&shared.key_empty[s], 4 * Traits::kConsumers * Traits::kArrivals);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::launch_dependents();
  ptx::wait_for_primary();
  if (threadIdx.x < 128) {
    ptx::registers_decrease<24>();
    if (threadIdx.x < 32) sample_detail::produce<Traits>(p, shared);
  } else {
    ptx::registers_increase<112>();
    sample_detail::consume<Traits>(p, shared);
  }
}

template <class Traits>
cudaError_t launch_sample_fold(const SampleParams &p, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Traits::Shared);
  static_assert(kBytes <= 227 * 1024, "an sm_90 thread block has 227 KiB of shared memory");
  return launch(sample_kernel<Traits>, dim3(multiprocessors), Traits::kThreads, kBytes, stream, p, true);
}

template <class Element, int kHeadDim>
cudaError_t launch_sample(const SampleParams &p, int multiprocessors, cudaStream_t stream) {
  if (p.block_keys_log2 == 2) return launch_sample_fold<SampleTraits<Element, kHeadDim, 2>>(p, multiprocessors, stream);
  if (p.block_keys_log2 == 6) return launch_sample_fold<SampleTraits<Element, kHeadDim, 6>>(p, multiprocessors, stream);
  return launch_sample_fold<SampleTraits<Element, kHeadDim, 0>>(p, multiprocessors, stream);
}

}  // namespace sample_attention

// Scoring for `residue` and `tile` on sm_90a: one pass of Q K^T over strided slices, without a P V product.
//
// A work item is 256 slice rows (two consumer warpgroups of two 64-row products each) against up to kSampleTileLimit key tiles of 128 slice keys. Each key tile
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
  // D = 128: 2 x 64 KiB of queries and 3 x 32 KiB of keys. D = 256 fits one of each.
  static constexpr int kQueryStages = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kStages = kHeadDim <= 128 ? 3 : 1;
  // A key tile's stage is given back before its last exponentials read the weights: one more stage keeps those from being overwritten.
  static constexpr int kWeightStages = kStages + 1;
  static constexpr int kConsumers = 2;
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
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::Int<128>, cute::Int<kBlockN>, cute::Int<kHeadDim>>>(),
                                    cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));

  struct Segment {
    int32_t local_head, group, slice, split;
    int32_t key_tile, key_tiles;  // key_tiles < 0: no more work
  };

  struct Shared {
    alignas(1024) Element query[cute::cosize_v<LayoutQ>];
    alignas(1024) Element key[cute::cosize_v<LayoutK>];
    alignas(128) float weight[kWeightStages][kBlockN];
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t key_full[kStages], key_empty[kStages];
    Segment segment[kQueryStages];
  };
  static constexpr uint32_t kQueryBytes = kRows * kHeadDim * sizeof(Element);
  static constexpr uint32_t kStageBytes = kBlockN * (kHeadDim * sizeof(Element) + sizeof(float));
};

namespace sample_detail {

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
        ptx::barrier_wait(&shared.key_empty[stage], key_ring.parity ^ 1);
        if (lane == 0) {
          ptx::barrier_arrive_expect(&shared.key_full[stage], Traits::kStageBytes);
          CUTE_UNROLL
          for (int slab = 0; slab < Traits::kSlabs; ++slab) {
            ptx::load_5d(map, &shared.key_full[stage], shared.key + layout_k(0, slab * Traits::kSlab, stage), slab * Traits::kSlab, slice.key_residue,
                         tile * Traits::kBlockN, kv_head, batch);
          }
          ptx::load_bulk(&shared.key_full[stage], shared.weight[weight_ring.stage], weight + tile * Traits::kBlockN, Traits::kBlockN * sizeof(float));
        }
        __syncwarp();
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

// Halves the values of a pair of lanes that differ in `bit`: each keeps the sums of every other value, in ascending order.
template <int kCount, int kSize>
__device__ __forceinline__ void exchange(float (&v)[kSize], int bit, int lane) {
  const bool upper = (lane & bit) != 0;
  CUTE_UNROLL
  for (int i = 0; i < kCount / 2; ++i) {
    float keep = upper ? v[2 * i + 1] : v[2 * i];
    v[i] = keep + __shfl_xor_sync(~0u, upper ? v[2 * i] : v[2 * i + 1], bit);
  }
}

template <int kCount>
__device__ __forceinline__ void fold(float (&v)[kPairs]) {
  CUTE_UNROLL
  for (int i = 0; i < kCount / 2; ++i) v[i] = v[2 * i] + v[2 * i + 1];
}

// The power of two that brings a row's largest value into [2^14, 2^15), and the base-2 exponent that undoes it: what binary16 rounds away below 2^-24 is 2^-38
// of that value.
struct Scale {
  float factor, undo;

  __device__ __forceinline__ explicit Scale(float top) {
    const int exponent = max(int(__float_as_uint(top) >> 23), 15);  // of a value that is not negative; 255 for inf and NaN, which stay what they are
    factor = __uint_as_float(uint32_t(268 - exponent) << 23);
    undo = float(exponent - 141);
  }
};

// Stores kCount values of each of a row's four lanes as binary16, under one Scale. Returns its undo.
template <int kCount, int kSize>
__device__ __forceinline__ float store_values(const float (&v)[kSize], uint16_t *target, bool mine) {
  float top = v[0];
  CUTE_UNROLL
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, v[i]);
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  const Scale scale(top);
  if constexpr (kCount == 1) {
    if (mine) *target = static_cast<uint16_t>(pack<cute::half_t>(v[0] * scale.factor, 0.f));
  } else {
    uint32_t word[kCount / 2];
    CUTE_UNROLL
    for (int i = 0; i < kCount / 2; ++i) word[i] = pack<cute::half_t>(v[2 * i] * scale.factor, v[2 * i + 1] * scale.factor);
    if constexpr (kCount == 2) *reinterpret_cast<uint32_t *>(target) = word[0];
    if constexpr (kCount == 4) *reinterpret_cast<uint2 *>(target) = make_uint2(word[0], word[1]);
    CUTE_UNROLL
    for (int i = 0; i + 4 <= kCount / 2; i += 4) reinterpret_cast<uint4 *>(target)[i / 4] = make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
  }
  return scale.undo;
}

// What the keys of one key tile give to the blocks of one row: kept by a thread while it walks over its pairs, then stored to a row of the table. reduce.cu
// knows the order of the slots. store() returns as store_values.
template <int kFold>
struct RowBlocks;

// Any size of block: pairs are kept and folded at the end.
template <>
struct RowBlocks<0> {
  float v[kPairs];

  __device__ __forceinline__ void clear() {}
  __device__ __forceinline__ void add(int j, float a, float b, float2 w, int) { v[j] = fmaf(a, w.x, b * w.y); }
  __device__ __forceinline__ float store(uint16_t *row, int keys_log2, int lane) {
    const int part = lane % 4;
    if (keys_log2 == 1) return store_values<16>(v, row + 16 * part, true);
    if (keys_log2 == 2) {
      exchange<16>(v, 1, lane);
      return store_values<8>(v, row + 8 * part, true);
    }
    if (keys_log2 == 3) {
      exchange<16>(v, 1, lane);
      exchange<8>(v, 2, lane);
      return store_values<4>(v, row + 4 * part, true);
    }
    fold<16>(v);
    if (keys_log2 == 4) {
      exchange<8>(v, 1, lane);
      exchange<4>(v, 2, lane);
      return store_values<2>(v, row + 2 * part, true);
    }
    fold<8>(v);
    if (keys_log2 == 5) {
      exchange<4>(v, 1, lane);
      exchange<2>(v, 2, lane);
      return store_values<1>(v, row + part, true);
    }
    fold<4>(v);
    if (keys_log2 == 6) {
      exchange<2>(v, 1, lane);
      v[0] += __shfl_xor_sync(~0u, v[0], 2);
      return store_values<1>(v, row + part, part < 2);
    }
    fold<2>(v);
    v[0] += __shfl_xor_sync(~0u, v[0], 1);
    v[0] += __shfl_xor_sync(~0u, v[0], 2);
    return store_values<1>(v, row, part == 0);
  }
};

// `residue` with 16 slices and blocks of 64: four slice keys a block, two pairs in neighbouring lanes.
template <>
struct RowBlocks<2> {
  float v[kPairs / 2], even;

  __device__ __forceinline__ void clear() {}
  __device__ __forceinline__ void add(int j, float a, float b, float2 w, int lane) {
    const float pair = fmaf(a, w.x, b * w.y);
    if (j % 2 == 0) {
      even = pair;
    } else {
      const bool upper = lane % 2 != 0;
      v[j / 2] = (upper ? pair : even) + __shfl_xor_sync(~0u, upper ? even : pair, 1);
    }
  }
  __device__ __forceinline__ float store(uint16_t *row, int, int lane) { return store_values<8>(v, row + 8 * (lane % 4), true); }
};

// `tile` with blocks of 64.
template <>
struct RowBlocks<6> {
  float v[2];

  __device__ __forceinline__ void clear() { v[0] = v[1] = 0.f; }
  __device__ __forceinline__ void add(int j, float a, float b, float2 w, int) { v[j / 8] = fmaf(a, w.x, fmaf(b, w.y, v[j / 8])); }
  __device__ __forceinline__ float store(uint16_t *row, int, int lane) {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      v[i] += __shfl_xor_sync(~0u, v[i], 1);
      v[i] += __shfl_xor_sync(~0u, v[i], 2);
    }
    const Scale scale(fmaxf(v[0], v[1]));
    if (lane % 4 == 0) *reinterpret_cast<uint32_t *>(row) = pack<cute::half_t>(v[0] * scale.factor, v[1] * scale.factor);
    return scale.undo;
  }
};

template <class Traits>
__device__ __forceinline__ void consume(const SampleParams &p, typename Traits::Shared &shared) {
  using namespace cute;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr bool kPipelined = Traits::kStages > 1;  // a product runs under the exponentials of its own warpgroup
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
  const float slack = 64.f / logit.multiplier;  // of a score before scaling: 2^64 of its exponential
  const int slots_log2 = Traits::kFold > 0 ? 7 - Traits::kFold : sample_slots_log2(p.block_keys_log2);

  while (true) {
    const int query_stage = query_ring.stage;
    ptx::barrier_wait(&shared.query_full[query_stage], query_ring.parity);
    const typename Traits::Segment &segment = shared.segment[query_stage];  // read where it is needed: registers are short
    const int key_tiles = segment.key_tiles;
    if (key_tiles < 0) break;
    auto slice_of = [&] { return Slice(p, RealKeys(p, (p.first_head + segment.local_head) / p.heads), segment.group, segment.slice); };
    const int64_t first_row = table_row(p, segment.local_head, segment.slice, segment.group, segment.key_tile, row_in_tile);
    float *reference = p.reference + first_row;
    uint16_t *table = p.table + (first_row << slots_log2);
    int open_low, open_high;  // key tiles in between need no mask
    {
      const Slice slice = slice_of();
      open_low = (slice.key_low + kBlockN - 1) / kBlockN - segment.key_tile;
      open_high = (slice.key_end(p, slice.row0) + 1) / kBlockN - 1 - segment.key_tile;
    }
    float peak[2][2], sum[2][2];  // of a row: the reference of its exponentials (equal in its four lanes), and this lane's share of their sum
    CUTE_UNROLL
    for (int m = 0; m < 2; ++m) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        peak[m][r] = -INFINITY;
        sum[m][r] = 0.f;
      }
    }

    auto score = [&](auto &scores, int m, int n) {
      if (logit.capped()) {
        CUTE_UNROLL
        for (int e = 0; e < size(scores); ++e) scores(e) = logit.cap(scores(e));
      }
      if (n < open_low || n > open_high) {
        const Slice slice = slice_of();
        const int first_key = (segment.key_tile + n) * kBlockN + pair;
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int key_end = slice.key_end(p, slice.row0 + m * 128 + row_in_tile + 8 * r);
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
      // Any reference within 2^100 of a row's largest exponential serves, since it cancels: the one at hand is kept until a score outgrows it by 2^64.
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
      if (__any_sync(~0u, top[0][0] > peak[m][0] + slack || top[1][0] > peak[m][1] + slack)) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          float most = fmaxf(top[r][0], peak[m][r]);
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
          if (most > peak[m][r]) sum[m][r] *= ptx::exp2_fast((peak[m][r] - most) * logit.multiplier);
          peak[m][r] = most;
        }
      }
      RowBlocks<Traits::kFold> blocks[2];
      float shift[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        shift[r] = peak[m][r] == -INFINITY ? 0.f : peak[m][r] * logit.multiplier;
        blocks[r].clear();
      }
      const float *weight = shared.weight[weight_ring.stage] + pair;
      constexpr int kBatch = 4;  // pairs whose exponentials are under way together
      CUTE_UNROLL
      for (int first = 0; first < kPairs; first += kBatch) {
        CUTE_UNROLL
        for (int e = 4 * first; e < 4 * (first + kBatch); ++e) scores(e) = ptx::exp2_fast(fmaf(scores(e), logit.multiplier, -shift[e / 2 % 2]));
        CUTE_UNROLL
        for (int j = first; j < first + kBatch; ++j) {
          const float2 w = *reinterpret_cast<const float2 *>(weight + 8 * j);
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            const float a = scores(2 * r + 4 * j), b = scores(1 + 2 * r + 4 * j);
            sum[m][r] += a + b;
            blocks[r].add(j, a, b, w, lane);
          }
        }
      }
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int own_row = m * table_rows(p, 128) + r * table_rows(p, 8);
        float *own = reference + own_row;
        const float undo = blocks[r].store(table + (own_row << slots_log2), 7 - slots_log2, lane);
        if (lane % 4 == 0) *own = shift[r] + undo;
      }
    };
    auto release_keys = [&](int stage) {
      __syncwarp();
      if (lane < Traits::kArrivals) ptx::barrier_arrive(&shared.key_empty[stage]);
    };

    auto next_keys = [&] { ptx::barrier_wait(&shared.key_full[key_ring.stage], key_ring.parity); };
    // The compiler must not carry the descriptors of a whole item in registers: they are worked out at each product.
    auto anew = [](int stage) {
      asm volatile("" : "+r"(stage));
      return stage;
    };
    auto issue_upper = [&] { issue_gemm<true>(mma, stage_of(fUpper, anew(query_stage)), stage_of(fK, anew(key_ring.stage)), upper); };
    auto issue_lower = [&] { issue_gemm<true>(mma, stage_of(fLower, anew(query_stage)), stage_of(fK, anew(key_ring.stage)), lower); };
    auto next_tile = [&] {
      weight_ring.advance();
      reference += kSampleRows * p.classes;
      table += (kSampleRows * p.classes) << slots_log2;
    };
    // The last key tile lies beyond the last query of the upper 128 rows, in every slice: it adds nothing to them, and nobody reads what the table has there (a
    // query tile of 256 rows or a block of 256 keys would).
    auto upper_done = [&] {
      const Slice slice = slice_of();
      return p.tile_rows_log2 < 8 && p.block_keys_log2 < 8 &&
             slice.shift + ((slice.row0 + 128) << p.row_log2) <= ((segment.key_tile + key_tiles - 1) * kBlockN) << p.key_log2;
    };
    if (key_tiles > 0) {
      next_keys();
      issue_upper();
      gemm_wait<0>();
      gemm_fence(upper);
      // Each product runs under the other's exponentials. None is in flight where the loop turns, and the last key tile stands alone: ptxas serialises else.
      for (int n = 0; n + 1 < key_tiles; ++n) {
        const int stage = key_ring.stage;
        issue_lower();
        score(upper, 0, n);
        key_ring.advance();
        if constexpr (kPipelined) {
          next_keys();
          issue_upper();
          gemm_wait<1>();
          gemm_fence(lower);
          release_keys(stage);
          score(lower, 1, n);
        } else {
          gemm_wait<0>();
          gemm_fence(lower);
          release_keys(stage);
          score(lower, 1, n);
          next_keys();
          issue_upper();
        }
        gemm_wait<0>();
        gemm_fence(upper);
        next_tile();
      }
      issue_lower();
      if (!upper_done()) score(upper, 0, key_tiles - 1);
      gemm_wait<0>();
      gemm_fence(lower);
      release_keys(key_ring.stage);
      key_ring.advance();
      score(lower, 1, key_tiles - 1);
      next_tile();
    }

    const Slice slice = slice_of();
    const RealKeys real(p, (p.first_head + segment.local_head) / p.heads);
    float *lse = p.lse + lse_index(p, segment.local_head, segment.slice, segment.group, segment.split) * kSampleRows;
    CUTE_UNROLL
    for (int m = 0; m < 2; ++m) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float total = sum[m][r];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        int row = m * 128 + row_in_tile + 8 * r;
        int position = slice.position(p, slice.row0 + row);
        bool sampled = slice.row0 + row < slice.row_limit && position >= real.first && position < real.last && total != 0.f;
        if (lane % 4 == 0) lse[row] = sampled ? peak[m][r] * logit.multiplier + log2f(total) : INFINITY;
      }
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
      ptx::barrier_init(&shared.key_full[s], 1);
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
    ptx::registers_increase<240>();
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

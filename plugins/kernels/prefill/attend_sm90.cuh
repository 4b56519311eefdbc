// Block-sparse FlashAttention for sm_90a.
//
// One producer warp feeds K and V through one ring of shared-memory stages with the tensor copy engine, in the order in which they are used: K0 K1 V0 K2 V1 ..
// Two consumer warpgroups own 64 query rows each. A consumer keeps the scores of one key tile and the P V product of the tile before in flight together, and
// the two consumers take turns at issuing, so that one's exponentials run under the other's matrix products.
//
// A key tile is kBlockN keys made of kBlockN / unit list entries, so key blocks of 16 .. 256 share one kernel. What is read is the list's; what is
// allowed is the mask's.
#pragma once

#include "../common/gmma.cuh"
#include "../common/launch.cuh"
#include "../common/logits.cuh"
#include "../common/pack.cuh"
#include "../common/pipeline.cuh"
#include "../common/ptx.cuh"
#include "attend_params.h"
#include "work.cuh"

#include <cuda_runtime_api.h>
#include <cute/tensor.hpp>

namespace sample_attention {

template <class Element_, int kHeadDim_>
struct AttendTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kAttendRows;
  // Registers of a consumer thread: kBlockN/2 scores + kBlockN/4 packed P + D/2 output. 240 hold 128 keys up to D = 128, 64 keys at D = 256.
  static constexpr int kBlockN = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kStages = 5;  // of a key or a value tile
  // A second query buffer hides the load of the next tile; at D = 256 it would not fit (2 x 64 + 5 x 32 KiB of 227).
  static constexpr int kQueryStages = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kMinUnit = 16;
  static constexpr int kMaxUnits = kBlockN / kMinUnit;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
#ifdef SA_EVERY_LANE_ARRIVES  // for compute-sanitizer: racecheck does not see that __syncwarp puts all lanes' accesses before lane 0's arrival
  static constexpr int kArrivals = 32;
#else
  static constexpr int kArrivals = 1;
#endif

  using Atoms = SmemAtoms<Element, kHeadDim>;
  static constexpr int kSlab = Atoms::kSlab;
  static constexpr int kSlabs = Atoms::kSlabs;

  using LayoutQ = decltype(cute::tile_to_shape(typename Atoms::RowMajor{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>, cute::Int<kQueryStages>>{}));
  using LayoutK = decltype(cute::tile_to_shape(typename Atoms::RowMajor{}, cute::Shape<cute::Int<kBlockN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  // The same bytes as LayoutK seen as [D, keys], the operand of P V.
  using LayoutVt = decltype(cute::tile_to_shape(typename Atoms::Transposed{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kBlockN>, cute::Int<kStages>>{},
                                                cute::Step<cute::_2, cute::_1, cute::_3>{}));
  static_assert(cute::cosize_v<LayoutK> == kBlockN * kHeadDim * kStages && cute::cosize_v<LayoutVt> == cute::cosize_v<LayoutK>);

  using WarpGroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::Int<kRows>, cute::Int<kBlockN>, cute::Int<kHeadDim>>>(), WarpGroups{}));
  using MmaOutput =
      decltype(cute::make_tiled_mma(cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>, cute::Int<kBlockN>>,
                                                               cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
                                    WarpGroups{}));

  struct Work {
    int32_t batch, head, tile, key_tiles;  // key_tiles < 0: no more work
  };

  struct Shared {
    alignas(1024) Element query[cute::cosize_v<LayoutQ>];
    alignas(1024) Element key_value[cute::cosize_v<LayoutK>];
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t full[kStages], empty[kStages];
    Work work[kQueryStages];
    int32_t start[kStages][kMaxUnits];  // of a key tile: first key of each list entry
    int32_t masked[kStages];            // of a key tile: whether some pair is not allowed
  };

  static constexpr uint32_t kQueryBytes = kRows * kHeadDim * sizeof(Element);
  static constexpr uint32_t kStageBytes = kBlockN * kHeadDim * sizeof(Element);
};

namespace attend_detail {

// Key tiles before its last one at which an item draws the next: late, so that no thread block keeps work that another could do.
constexpr int kDrawTiles = 2;

template <class Traits>
__device__ __forceinline__ void produce(const AttendParams &p, typename Traits::Shared &shared) {
  using namespace cute;
  const int lane = threadIdx.x % 32;
  const int items = p.batch * p.heads * p.tiles;
  const int group = p.heads / p.kv_heads;
  const int unit = 1 << p.unit_log2;
  const int units = Traits::kBlockN >> p.unit_log2;
  if (lane == 0) {
    ptx::prefetch_map(&p.query);
    ptx::prefetch_map(&p.key);
    ptx::prefetch_map(&p.value);
    ptx::prefetch_map(&p.output);
  }
  typename Traits::LayoutQ layout_q;
  typename Traits::LayoutK layout_k;
  Ring<Traits::kStages> ring;
  Ring<Traits::kQueryStages> query_ring;

  int item = blockIdx.x;
  while (item < items) {
    int next = 0;
    auto draw = [&] {
      if (lane == 0) next = gridDim.x + atomicAdd(p.ticket, 1);
    };
    int batch, head, tile;
    decode_item(p, item, batch, head, tile);
    const int kv_head = head / group;
    const Span real = real_keys(p, batch);
    const Units list(p, real, batch, head, tile);
    const int key_tiles = (list.count + units - 1) / units;
    const int first_position = p.keys - p.queries + tile * kAttendRows;

    // Into the next stage, the list entries that begin at `start`: one of a lane.
    auto load = [&](const CUtensorMap *map, int start) {
      const int stage = ring.stage;
      __syncwarp();
      if (lane == 0) {
        ptx::barrier_arrive_expect(&shared.full[stage], Traits::kStageBytes);
      } else if (Traits::kArrivals == 32) {
        ptx::barrier_arrive(&shared.full[stage]);
      }
      __syncwarp();
      if (lane < units) {
        CUTE_UNROLL
        for (int slab = 0; slab < Traits::kSlabs; ++slab) {
          ptx::load_4d(map, &shared.full[stage], shared.key_value + layout_k(lane * unit, slab * Traits::kSlab, stage), slab * Traits::kSlab, start, kv_head,
                       batch);
        }
      }
      ring.advance();
    };
    auto load_keys = [&](int start) {
      bool masked = lane < units && (start + unit - 1 > first_position || start < real.first || start + unit > real.last);
      const bool any = __any_sync(~0u, masked);
      ptx::barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      if (lane < units) shared.start[ring.stage][lane] = start;
      if (lane == 0) shared.masked[ring.stage] = any;
      load(&p.key, start);
    };
    auto load_values = [&](int start) {
      ptx::barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      load(&p.value, start);
    };

    // Thread blocks that run together walk in step. Even query tiles go from the last key tile to the first, odd ones back: if all began at the same end, every
    // round of them would find there the keys that L2 has dropped longest ago. The way depends on the tile alone, so results repeat.
    const bool forward = tile & 1;
    auto start_of = [&](int n) { return lane < units ? list.start(p, (forward ? key_tiles - 1 - n : n) * units + lane) : kNoKey; };
    int start = key_tiles > 0 ? start_of(key_tiles - 1) : kNoKey;
    if (key_tiles > 0) load_keys(start);

    ptx::barrier_wait(&shared.query_empty[query_ring.stage], query_ring.parity ^ 1);
    if (lane == 0) {
      int stage = query_ring.stage;
      shared.work[stage] = {batch, head, tile, key_tiles};
      ptx::barrier_arrive_expect(&shared.query_full[stage], Traits::kQueryBytes);
      CUTE_UNROLL
      for (int slab = 0; slab < Traits::kSlabs; ++slab) {
        ptx::load_4d(&p.query, &shared.query_full[stage], shared.query + layout_q(0, slab * Traits::kSlab, stage), slab * Traits::kSlab, tile * kAttendRows,
                     head, batch);
      }
    }
    __syncwarp();
    query_ring.advance();

    if (key_tiles < kDrawTiles + 2) draw();
    for (int n = key_tiles - 2; n >= 0; --n) {
      if (n == kDrawTiles) draw();
      int before = start;
      start = start_of(n);
      load_keys(start);
      load_values(before);
    }
    if (key_tiles > 0) load_values(start);
    item = __shfl_sync(~0u, next, 0);
  }
  ptx::barrier_wait(&shared.query_empty[query_ring.stage], query_ring.parity ^ 1);
  if (lane == 0) {
    shared.work[query_ring.stage] = {0, 0, 0, -1};
    ptx::barrier_arrive(&shared.query_full[query_ring.stage]);
  }
}

template <class Traits>
__device__ __forceinline__ void consume(const AttendParams &p, typename Traits::Shared &shared) {
  using namespace cute;
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr int kHeadDim = Traits::kHeadDim;
  enum { kTurn = 1, kEpilogue = 3 };  // named barriers; 0 is __syncthreads

  const int thread = threadIdx.x % 128;
  const int lane = threadIdx.x % 32;
  const int consumer = threadIdx.x / 128 - 1;
  const int row_in_tile = consumer * 64 + (thread / 32) * 16 + lane / 4;  // and the row 8 below
  const int pair = (lane % 4) * 2;                                        // first of two columns in each group of 8
  const LogitScale logit(p.scale, p.softcap);
  const float multiplier = logit.multiplier;

  Tensor sQ = make_tensor(make_smem_ptr(shared.query), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(shared.key_value), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(shared.key_value), typename Traits::LayoutVt{});
  typename Traits::MmaScores mma_scores;
  typename Traits::MmaOutput mma_output;
  auto fQ = operand_a(mma_scores, consumer, sQ);
  auto fK = operand_b(mma_scores, consumer, sK);
  auto fV = operand_b(mma_output, consumer, sVt);

  // Accumulator element i + 2 r + 4 j of a thread: row row_in_tile + 8 r, column 8 j + pair + i. As the register operand of P V the same
  // order reads ((i, r, half), 1, k16), so rounding P is a straight copy.
  Tensor scores = partition_fragment_C(mma_scores, Shape<Int<Traits::kRows>, Int<kBlockN>>{});
  Tensor out = partition_fragment_C(mma_output, Shape<Int<Traits::kRows>, Int<kHeadDim>>{});
  Tensor probs = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kBlockN / 16>>>{});
  Tensor probs_packed = recast<uint32_t>(probs);
  static_assert(decltype(size(scores))::value == kBlockN / 2 && decltype(size(out))::value == kHeadDim / 2);

  Ring<Traits::kStages> ring;
  Ring<Traits::kQueryStages> query_ring;
  if (consumer == 1) ptx::named_arrive(kTurn + 0, 256);  // the first turn is consumer 0's

  while (true) {
    const int query_stage = query_ring.stage;
    ptx::barrier_wait(&shared.query_full[query_stage], query_ring.parity);
    const auto work = shared.work[query_stage];
    if (work.key_tiles < 0) break;
    const Span real = real_keys(p, work.batch);
    const int position = p.keys - p.queries + work.tile * kAttendRows + row_in_tile;

    float row_max[2] = {-INFINITY, -INFINITY};
    float row_sum[2] = {0.f, 0.f};
    float rescale[2] = {1.f, 1.f};
    clear(out);

    // Turns raw scores into unnormalised probabilities, in place, and updates the running maximum and sum.
    auto softmax = [&](int stage, bool masked) {
      if (logit.capped()) {
        CUTE_UNROLL
        for (int e = 0; e < size(scores); ++e) scores(e) = logit.cap(scores(e));
      }
      if (masked) {
        CUTE_UNROLL
        for (int j = 0; j < kBlockN / 8; ++j) {
          int key = shared.start[stage][(8 * j) >> p.unit_log2] + ((8 * j) & ((1 << p.unit_log2) - 1)) + pair;
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            bool outside = key + i < real.first || key + i >= real.last;
            CUTE_UNROLL
            for (int r = 0; r < 2; ++r) {
              if (outside || key + i > position + 8 * r) scores(i + 2 * r + 4 * j) = -INFINITY;
            }
          }
        }
      }
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float peak = row_max[r];
        CUTE_UNROLL
        for (int j = 0; j < kBlockN / 8; ++j) peak = fmaxf(peak, fmaxf(scores(2 * r + 4 * j), scores(1 + 2 * r + 4 * j)));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
        // A row that has met no key yet has peak -inf: subtract 0 instead, so that its probabilities are exp2(-inf) = 0.
        float shift = peak == -INFINITY ? 0.f : peak * multiplier;
        rescale[r] = ptx::exp2_fast(row_max[r] * multiplier - shift);
        row_max[r] = peak;
        float sum = 0.f;
        CUTE_UNROLL
        for (int j = 0; j < kBlockN / 8; ++j) {
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            float &s = scores(i + 2 * r + 4 * j);
            s = ptx::exp2_fast(fmaf(s, multiplier, -shift));
            sum += s;
          }
        }
        row_sum[r] = row_sum[r] * rescale[r] + sum;
      }
    };
    auto release = [&](int stage) {
      if (Traits::kArrivals == 32 || lane == 0) ptx::barrier_arrive(&shared.empty[stage]);
    };
    // The stage also holds the positions that a mask reads: it is given back early only when none is needed.
    auto finish_keys = [&](int stage) {
      const bool masked = shared.masked[stage];
      __syncwarp();
      if (!masked) release(stage);
      softmax(stage, masked);
      __syncwarp();
      if (masked) release(stage);
    };
    auto round_probs = [&] {
      CUTE_UNROLL
      for (int e = 0; e < size(probs_packed); ++e) probs_packed(e) = pack<Element>(scores(2 * e), scores(2 * e + 1));
    };

    if (work.key_tiles > 0) {
      ptx::barrier_wait(&shared.full[ring.stage], ring.parity);
      issue_gemm<true>(mma_scores, stage_of(fQ, query_stage), stage_of(fK, ring.stage), scores);
      gemm_wait<0>();
      gemm_fence(scores);
      finish_keys(ring.stage);
      ring.advance();
      round_probs();

      for (int n = work.key_tiles - 1; n > 0; --n) {
        const int key_stage = ring.stage;
        ptx::barrier_wait(&shared.full[key_stage], ring.parity);
        ring.advance();
        const int value_stage = ring.stage;
        ptx::named_sync(kTurn + consumer, 256);
        issue_gemm<true>(mma_scores, stage_of(fQ, query_stage), stage_of(fK, key_stage), scores);
        ptx::barrier_wait(&shared.full[value_stage], ring.parity);
        ring.advance();
        issue_gemm<false>(mma_output, probs, stage_of(fV, value_stage), out);
        ptx::named_arrive(kTurn + (consumer ^ 1), 256);
        gemm_wait<1>();
        gemm_fence(scores);
        finish_keys(key_stage);
        gemm_wait<0>();
        gemm_fence(out);
        release(value_stage);
        round_probs();
        CUTE_UNROLL
        for (int e = 0; e < size(out); ++e) out(e) *= rescale[(e / 2) % 2];
      }
      ptx::barrier_wait(&shared.full[ring.stage], ring.parity);
      issue_gemm<false>(mma_output, probs, stage_of(fV, ring.stage), out);
      gemm_wait<0>();
      gemm_fence(out);
      release(ring.stage);
      ring.advance();
    }

    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      float inverse = sum == 0.f ? 0.f : 1.f / sum;
      int row = work.tile * kAttendRows + row_in_tile + 8 * r;
      if (p.lse != nullptr && lane % 4 == 0 && row < p.queries) {
        float value = sum == 0.f ? -INFINITY : (row_max[r] * multiplier) * kLn2 + logf(sum);
        p.lse[(int64_t(work.batch) * p.heads + work.head) * p.queries + row] = value;
      }
      CUTE_UNROLL
      for (int j = 0; j < kHeadDim / 8; ++j) {
        // The query tile is spent: its 64 rows of this warpgroup carry the output to the copy engine.
        *reinterpret_cast<uint32_t *>(&sQ(row_in_tile + 8 * r, 8 * j + pair, query_stage)) =
            pack<Element>(out(2 * r + 4 * j) * inverse, out(1 + 2 * r + 4 * j) * inverse);
      }
    }
    ptx::fence_async_proxy();
    ptx::named_sync(kEpilogue + consumer, 128);
    if (thread == 0) {
      CUTE_UNROLL
      for (int slab = 0; slab < Traits::kSlabs; ++slab) {
        ptx::store_4d(&p.output, &sQ(consumer * 64, slab * Traits::kSlab, query_stage), slab * Traits::kSlab, work.tile * kAttendRows + consumer * 64,
                      work.head, work.batch);
      }
      ptx::store_commit();
      ptx::store_wait_read();
      ptx::barrier_arrive(&shared.query_empty[query_stage]);
    }
    query_ring.advance();
  }
  if (thread == 0) ptx::store_wait();
}

}  // namespace attend_detail

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) attend_kernel(const __grid_constant__ AttendParams p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Traits::kQueryStages; ++s) {
      ptx::barrier_init(&shared.query_full[s], 1);
      ptx::barrier_init(&shared.query_empty[s], Traits::kConsumers);
    }
    for (int s = 0; s < Traits::kStages; ++s) {
      ptx::barrier_init(&shared.full[s], Traits::kArrivals);
      ptx::barrier_init(&shared.empty[s], 4 * Traits::kConsumers * Traits::kArrivals);  // of each warp
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::wait_for_primary();
  if (threadIdx.x < 128) {
    ptx::registers_decrease<24>();
    if (threadIdx.x < 32) attend_detail::produce<Traits>(p, shared);
  } else {
    ptx::registers_increase<240>();
    attend_detail::consume<Traits>(p, shared);
  }
}

template <class Traits>
cudaError_t launch_attend(const AttendParams &p, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Traits::Shared);
  static_assert(kBytes <= 227 * 1024, "an sm_90 thread block has 227 KiB of shared memory");
  int64_t items = int64_t(p.batch) * p.heads * p.tiles;
  return launch(attend_kernel<Traits>, dim3(static_cast<unsigned>(items < multiprocessors ? items : multiprocessors)), Traits::kThreads, kBytes, stream, p,
                true);
}

}  // namespace sample_attention

// Smallest set of free key blocks that reaches alpha of the free blocks' sampled mass or fills the budget, joined with the forced ones. One warp or thread
// block a query tile.
//
// The threshold is found by bisection on the bit pattern of the mass (non-negative floats order like integers). The sum of the masses at or above a candidate
// is always formed in the same order, so it falls monotonically with the candidate in floating point too, and the result is deterministic. With a budget their
// number decides as well: both cut the same order of blocks, and the higher threshold is the shorter set.
#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "../common/real_keys.cuh"
#include "filter_params.h"

#include <cstdint>

namespace sample_attention {
namespace {

// A team of threads works on one query tile: a warp while its masses fit its registers (no barriers, many tiles an SM), else a whole thread block, whose masses
// stay in shared memory.
constexpr int kWarpTeamBlocks = 2048;
constexpr int kStep = 8;  // masses of a thread that are visited without a branch

// The masses of one query tile, mass k with member k % kTeam. kHeld: how many a thread keeps in registers; 0: shared memory.
template <int kTeam, int kHeld>
struct Masses {
  float held[kHeld > 0 ? kHeld : 1];
  float *shared;
  int member, blocks;

  // f(block, its mass as a reference) for this thread's blocks, in ascending order; blocks behind the last have mass 0 and are visited up to the next step.
  template <class F>
  __device__ __forceinline__ void each(F f) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int c = 0; c < kHeld; c += kStep) {
        if (c * kTeam < blocks) {
#pragma unroll
          for (int i = c; i < c + kStep; ++i) f(member + i * kTeam, held[i]);
        }
      }
    } else {
      for (int k = member; k < blocks; k += kTeam) f(k, shared[k]);
    }
  }
};

template <int kTeam>
struct Team {
  static constexpr int kWarps = kTeam / 32;

  // Sum over the team, formed in one fixed order.
  static __device__ __forceinline__ float sum(float v, float *scratch) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    if constexpr (kWarps == 1) {
      return v;
    } else {
      __syncthreads();
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
      __syncthreads();
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += scratch[w];
      return total;
    }
  }

  // Exclusive prefix over the team of one flag a thread, and the total.
  static __device__ __forceinline__ int rank(bool flag, int *scratch, int &total) {
    unsigned votes = __ballot_sync(~0u, flag);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = __popc(votes & ((1u << lane) - 1));
    if constexpr (kWarps == 1) {
      total = __popc(votes);
      return before;
    } else {
      __syncthreads();
      if (lane == 0) scratch[warp] = __popc(votes);
      __syncthreads();
      total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
      }
      return before;
    }
  }
};

struct Forced {
  int own_first, own_last, sink_first, sink_last;  // inclusive ranges of blocks; empty when last < first
  __device__ bool has(int block) const { return (block >= own_first && block <= own_last) || (block >= sink_first && block <= sink_last); }
  // Of the blocks up to own_last.
  __device__ int count() const { return own_last - own_first + 1 + max(min(sink_last, own_first - 1) - sink_first + 1, 0); }
};

// kBudget: max_density is below 1. A kernel of its own, because counting takes registers: without a budget nothing is paid.
template <int kTeam, int kTeams, int kHeld, bool kBudget>
__global__ void __launch_bounds__(kTeam *kTeams, 1) filter_kernel(const FilterParams p) {
  static_assert(kTeam == 32 || kTeams == 1, "teams of several warps use the barrier of the thread block");
  __shared__ float scratch[Team<kTeam>::kWarps];
  __shared__ int counts[Team<kTeam>::kWarps];
  ptx::launch_dependents();
  ptx::wait_for_primary();
  const int team = threadIdx.x / kTeam, member = threadIdx.x % kTeam;
  const int tile = blockIdx.x * kTeams + team, head = blockIdx.y, batch = blockIdx.z;
  if (tile >= p.tiles || (p.only != nullptr && p.only[batch] == 0)) return;
  const int64_t row = (int64_t(batch) * p.heads + head) * p.tiles + tile;
  int32_t *indices = p.indices + row * p.blocks;

  const int shift = p.keys - p.queries;
  const int first_row = (p.first_tile + tile) * p.block_q;
  const int first_position = shift + first_row;
  const int last_position = shift + min(first_row + p.block_q, p.queries) - 1;
  const int blocks = last_position / p.block_k + 1;  // those that begin at or before the last row
  const Span real = real_keys(p.bounds, batch, p.keys);
  const float alpha = p.alpha != nullptr ? p.alpha[head] : p.alpha_all;

  Forced forced;
  forced.own_first = max(first_position - p.window, 0) / p.block_k;
  forced.own_last = blocks - 1;
  forced.sink_first = real.first / p.block_k;
  forced.sink_last = p.sink > 0 ? (real.first + p.sink - 1) / p.block_k : -1;

  bool all = alpha >= 1.f || meets_dense_rows(real, first_position, last_position, p.dense_rows);
  // Free blocks that the budget leaves.
  const int room = kBudget ? max(static_cast<int>(ceilf(p.max_density * static_cast<float>(blocks))) - forced.count(), 0) : blocks;
  bool contest = false;
  float threshold = 0.f, need = 0.f, above = 0.f, above_count = 0.f;
  Masses<kTeam, kHeld> masses;
  masses.shared = reinterpret_cast<float *>(dynamic_shared());
  masses.member = member;
  masses.blocks = blocks;
  if (!all) {
    float total = 0.f, free = 0.f;
    const float *source = p.mass + row * p.blocks;
    masses.each([&](int k, float &m) {
      const float value = k < blocks ? source[k] : 0.f;
      total += value;
      // A forced block stays out of both sides of the contest.
      m = forced.has(k) ? 0.f : value;
      free += m;
    });
    total = Team<kTeam>::sum(total, scratch);
    free = Team<kTeam>::sum(free, scratch);
    need = alpha * free;
    all = !(total > 0.f) || isinf(total);
    contest = !all && need > 0.f && room > 0;
    if (contest) {
      auto enough = [&](float candidate) {
        float sum = 0.f;
        masses.each([&](int, float m) { sum += m >= candidate ? m : 0.f; });
        bool reached = Team<kTeam>::sum(sum, scratch) >= need;
        if constexpr (kBudget) {
          if (!reached) {
            float count = 0.f;
            masses.each([&](int, float m) { count += m >= candidate ? 1.f : 0.f; });
            reached = Team<kTeam>::sum(count, scratch) >= static_cast<float>(room);
          }
        }
        return reached;
      };
      // Largest pattern whose masses at or above it are enough. If neither all of their sum (by rounding) nor their number is, every block with mass is kept.
      uint32_t low = 1, high = 0x7f800000u;
      while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (enough(__uint_as_float(middle)))
          low = middle;
        else
          high = middle;
      }
      threshold = __uint_as_float(low);
      masses.each([&](int, float m) { above += m > threshold ? m : 0.f; });
      above = Team<kTeam>::sum(above, scratch);
      if constexpr (kBudget) {
        masses.each([&](int, float m) { above_count += m > threshold ? 1.f : 0.f; });
        above_count = Team<kTeam>::sum(above_count, scratch);
      }
    }
  }
  // Blocks that tie at the threshold are taken from the lower index up, until the need is met or the room is filled.
  int ties = contest ? max(1, static_cast<int>(fminf(ceilf((need - above) / threshold), 2e9f))) : 0;
  if constexpr (kBudget) ties = min(ties, room - static_cast<int>(above_count));
  int written = 0, tied = 0;
  auto emit = [&](int k, float m) {
    int in_round;
    bool inside = k < blocks;
    bool tie = contest && inside && m == threshold;
    int tie_rank = Team<kTeam>::rank(tie, counts, in_round);
    bool keep = inside && (all || forced.has(k) || (contest && (m > threshold || (tie && tied + tie_rank < ties))));
    tied += in_round;
    int rank = Team<kTeam>::rank(keep, counts, in_round);
    if (keep) indices[written + rank] = k;
    written += in_round;
  };
  if constexpr (kHeld > 0) {
    masses.each(emit);
  } else {
    for (int base = 0; base < blocks; base += kTeam) emit(base + member, contest && base + member < blocks ? masses.shared[base + member] : 0.f);
  }
  if (member == 0) p.counts[row] = written;
}

constexpr int kBins = 1024;

__global__ void __launch_bounds__(kBins) order_kernel(const OrderParams p) {
  __shared__ int start[kBins];
  __shared__ int warp_total[32];
  const int group = p.heads / p.kv_heads;
  const int items = group * p.tiles;
  const int first_head = blockIdx.x * group;  // of [B * Hq]
  auto bin_of = [&](int item) {
    int head = first_head + item % group, tile = item / group;
    int count = p.counts[int64_t(head) * p.list_tiles + tile / p.tiles_per_list];
    return kBins - 1 - min(kBins - 1, static_cast<int>(int64_t(count) * kBins / (p.capacity + 1)));
  };
  ptx::launch_dependents();
  ptx::wait_for_primary();
  if (p.ticket != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = 0;
  start[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < items; i += kBins) atomicAdd(&start[bin_of(i)], 1);
  __syncthreads();
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int own = start[threadIdx.x], sum = own;
  for (int d = 1; d < 32; d *= 2) {
    int other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) warp_total[warp] = sum;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) before += warp_total[w];
  start[threadIdx.x] = before + sum - own;
  __syncthreads();
  // The order among equals is not fixed; it moves work, never results.
  for (int i = threadIdx.x; i < items; i += kBins) {
    int slot = atomicAdd(&start[bin_of(i)], 1);
    p.order[int64_t(blockIdx.x) * items + slot] = (first_head + i % group) * p.tiles + i / group;
  }
}

}  // namespace

namespace {

template <int kTeam, int kTeams, int kHeld, bool kBudget>
cudaError_t launch_teams(const FilterParams &params, cudaStream_t stream, bool early) {
  dim3 grid((params.tiles + kTeams - 1) / kTeams, params.heads, params.batch);
  const int bytes = kHeld > 0 ? 0 : params.blocks * static_cast<int>(sizeof(float));
  return launch(filter_kernel<kTeam, kTeams, kHeld, kBudget>, grid, kTeam * kTeams, bytes, stream, params, early);
}

template <bool kBudget>
cudaError_t launch_sized(const FilterParams &params, cudaStream_t stream, bool early) {
  if (params.blocks <= 256) return launch_teams<32, 4, 8, kBudget>(params, stream, early);
  if (params.blocks <= 512) return launch_teams<32, 4, 16, kBudget>(params, stream, early);
  if (params.blocks <= 1024) return launch_teams<32, 4, 32, kBudget>(params, stream, early);
  if (params.blocks <= kWarpTeamBlocks) return launch_teams<32, 4, 64, kBudget>(params, stream, early);
  return launch_teams<256, 1, 0, kBudget>(params, stream, early);
}

}  // namespace

cudaError_t launch_filter(const FilterParams &params, cudaStream_t stream, bool early) {
  return params.max_density < 1.f ? launch_sized<true>(params, stream, early) : launch_sized<false>(params, stream, early);
}

cudaError_t launch_order(const OrderParams &params, cudaStream_t stream, bool early) {
  return launch(order_kernel, dim3(params.batch * params.kv_heads), kBins, 0, stream, params, early);
}

}  // namespace sample_attention

// Sampling for every policy: the log-sum-exp of each sampled row, then the probability inside each key block.
#include "samples.cuh"

namespace sample_attention::generic {
namespace {

// One warp a value row.
__global__ void __launch_bounds__(kThreads) weigh_kernel(const WeighParams p) {
  const int lane = threadIdx.x % 32, kv_head = blockIdx.y, batch = blockIdx.z;
  const int j = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (j >= p.in.keys || (p.in.only != nullptr && p.in.only[batch] == 0)) return;
  const int64_t row = batch * p.in.value.b + kv_head * p.in.value.h + j * p.in.value.s;
  float sum = 0.f;
  for (int d = lane; d < p.in.value_dim; d += 32) {
    const float v = load(p.in.value.data, row + d, p.in.dtype);
    sum = fmaf(v, v, sum);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) p.weight[(int64_t(batch) * p.in.kv_heads + kv_head) * p.in.keys + j] = sqrtf(sum);
}

__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const RowsParams p) {
  __shared__ Tile tile;
  __shared__ Rows rows;
  __shared__ int keys[kTile];
  const Inputs &in = p.in;
  if (nothing_to_do(in)) return;
  const Samples &s = p.sample;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const int groups = (s.slots + kTile - 1) / kTile;
  const int64_t items = int64_t(in.batch) * in.heads * s.classes * groups;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int group = static_cast<int>(item % groups);
    const int cls = static_cast<int>(item / groups % s.classes);
    const int head = static_cast<int>(item / groups / s.classes % in.heads), batch = static_cast<int>(item / groups / s.classes / in.heads);
    if ((in.only != nullptr && in.only[batch] == 0) || is_full_head(s, head)) continue;
    const Real real(in, batch);
    const int last = gather_rows(tile, rows, s, in, real, batch, head, cls, group * kTile, nullptr);
    const int offset = first_key(s, cls);
    const int64_t key_base = batch * in.key.b + int64_t(head / (in.heads / in.kv_heads)) * in.key.h;

    float top[4], sum[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      top[r] = -kInfinity;
      sum[r] = 0.f;
    }
    const int begin = max(real.first - offset, 0) / s.classes / kTile * kTile;
    for (int n = begin; offset + int64_t(n) * s.classes <= last && offset + int64_t(n) * s.classes < real.end; n += kTile) {
      __syncthreads();
      if (threadIdx.x < kTile) {
        const int64_t j = offset + int64_t(n + threadIdx.x) * s.classes;
        const bool inside = j < in.keys && real.has(static_cast<int>(j));
        keys[threadIdx.x] = inside ? static_cast<int>(j) : in.keys;
        tile.key_at[threadIdx.x] = inside ? key_base + j * in.key.s : -1;
      }
      const Scores scores = score<false>(tile, in);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int position = rows.position[4 * y + r];
        float peak = top[r];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (keys[4 * x + c] <= position) peak = fmaxf(peak, scores.at[r][c]);
        }
        const float shift = peak == -kInfinity ? 0.f : peak;
        sum[r] *= expf(top[r] - shift);
        top[r] = peak;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (keys[4 * x + c] <= position) sum[r] += expf(scores.at[r][c] - shift);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float peak = row_max(top[r]);
      const float total = row_sum(sum[r] * expf(top[r] - (peak == -kInfinity ? 0.f : peak)));
      const int slot = group * kTile + 4 * y + r;
      // NaN scores leave no maximum but a NaN sum.
      if (x == 0 && slot < s.slots)
        s.lse[((int64_t(batch) * in.heads + head) * s.classes + cls) * s.slots + slot] =
            total == 0.f ? kInfinity : (peak == -kInfinity ? 0.f : peak) + logf(total);
    }
  }
}

// How the tiles and blocks of a launch are cut into items of at least 64 slots by 64 keys of a class.
struct Grouping {
  bool whole;                // one selection for a head: its only tile has all slots
  int slots;                 // slots of an item
  int tiles, tile_rows;      // query tiles of an item, and rows of each inside a score tile
  int keys, blocks;          // keys of a class and key blocks of an item
  int columns, tile_blocks;  // columns of a block inside a score tile, and blocks of a score tile
  int row_groups, key_groups;

  Grouping() = default;
  __host__ __device__ __forceinline__ Grouping(const Samples &s, int all_blocks) {
    whole = s.policy == SA_COLUMN_SLASH || s.policy == SA_STRIPE_WINDOW;
    slots = s.slots_per_tile > kTile || whole ? s.slots_per_tile : kTile;
    tiles = whole ? 1 : slots / s.slots_per_tile;
    tile_rows = kTile / tiles;
    const int block_keys = s.block_k / s.classes;
    keys = block_keys > kTile ? block_keys : kTile;
    blocks = keys / block_keys;
    columns = block_keys < kTile ? block_keys : kTile;
    tile_blocks = kTile / columns;
    row_groups = (s.tiles + tiles - 1) / tiles;
    key_groups = (all_blocks + blocks - 1) / blocks;
  }
};

// One item: the tiles of one group of slots against the blocks of one group of keys, for all classes. Sums are formed in one fixed order.
__global__ void __launch_bounds__(kThreads, 2) mass_kernel(const MassParams p) {
  constexpr int kCells = kTile * kTile / kThreads;
  constexpr int kProbabilityPitch = kTile + 1;
  __shared__ Tile tile;
  __shared__ Rows rows;
  __shared__ int keys[kTile];
  __shared__ float weights[kTile];
  __shared__ float by_block[kTile * kTile];  // [row][block]
  float *probability = tile.slabs;           // [64][65]
  static_assert(kTile * kProbabilityPitch <= 2 * kSlab * kPitch, "the probabilities lie where the slabs were");

  const Inputs &in = p.in;
  const Samples &s = p.sample;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  if (nothing_to_do(in)) return;
  __shared__ Grouping g;  // the accumulators need the registers
  if (threadIdx.x == 0) g = Grouping(s, p.blocks);
  __syncthreads();
  for (int64_t item = blockIdx.x; item < int64_t(in.batch) * in.heads * g.row_groups * g.key_groups; item += gridDim.x) {
    const int key_group = static_cast<int>(item % g.key_groups);
    const int row_group = static_cast<int>(item / g.key_groups % g.row_groups);
    const int head = static_cast<int>(item / g.key_groups / g.row_groups % in.heads), batch = static_cast<int>(item / g.key_groups / g.row_groups / in.heads);
    if ((in.only != nullptr && in.only[batch] == 0) || is_full_head(s, head)) continue;
    auto last_position = [&](int t) { return g.whole ? in.keys - 1 : in.keys - in.queries + min(s.first_row + (t + 1) * s.block_q, in.queries) - 1; };
    if (int64_t(key_group) * g.blocks * s.block_k > last_position(min((row_group + 1) * g.tiles, s.tiles) - 1)) continue;

    const Real real(in, batch);
    float sums[kCells];
#pragma unroll
    for (int e = 0; e < kCells; ++e) sums[e] = 0.f;

    for (int cls = 0; cls < s.classes; ++cls) {
      const float *lse = s.lse + ((int64_t(batch) * in.heads + head) * s.classes + cls) * s.slots;
      for (int slot = 0; slot < g.slots; slot += kTile) {
        const int last = gather_rows(tile, rows, s, in, real, batch, head, cls, row_group * g.slots + slot, lse);
        for (int n = 0; n < g.keys; n += kTile) {
          const int64_t from = first_key(s, cls) + (int64_t(key_group) * g.keys + n) * s.classes;
          if (from > last || from >= real.end) break;
          __syncthreads();
          if (threadIdx.x < kTile) {
            const int kv_head = head / (in.heads / in.kv_heads);
            const int64_t j = from + int64_t(threadIdx.x) * s.classes;
            const bool inside = j < in.keys && real.has(static_cast<int>(j));
            keys[threadIdx.x] = inside ? static_cast<int>(j) : in.keys;
            tile.key_at[threadIdx.x] = inside ? batch * in.key.b + kv_head * in.key.h + j * in.key.s : -1;
            weights[threadIdx.x] = inside && p.weight != nullptr ? p.weight[(int64_t(batch) * in.kv_heads + kv_head) * in.keys + j] : 1.f;
          }
          const Scores scores = score<false>(tile, in);
          __syncthreads();
#pragma unroll
          for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const bool allowed = keys[4 * x + c] <= rows.position[4 * y + r];
              probability[(4 * y + r) * kProbabilityPitch + 4 * x + c] = allowed ? expf(scores.at[r][c] - rows.lse[4 * y + r]) * weights[4 * x + c] : 0.f;
            }
          }
          __syncthreads();
          if (p.slash != nullptr) {
            // Sixteen keys of a row: at most a few distance classes. Integer sums do not depend on their order.
            const int row = threadIdx.x / 4, part = threadIdx.x % 4 * 16;
            const int position = rows.position[row];
            unsigned long long *slash = p.slash + (int64_t(batch) * in.heads + head) * p.blocks;
            int at = -1;
            float sum = 0.f;
            for (int c = part; c <= part + 16; ++c) {
              const bool more = c < part + 16 && keys[c] <= position;
              const int distance = more ? (position - keys[c]) / s.block_k : -1;
              if (distance != at && at >= 0 && sum > 0.f) atomicAdd(slash + at, static_cast<unsigned long long>(double(sum) * 8589934592.0 + 0.5));
              if (distance != at) sum = 0.f;
              at = distance;
              if (more) sum += probability[row * kProbabilityPitch + c];
            }
          }
          for (int unit = threadIdx.x; unit < kTile * g.tile_blocks; unit += kThreads) {
            const float *source = probability + unit / g.tile_blocks * kProbabilityPitch + unit % g.tile_blocks * g.columns;
            float sum = 0.f;
            for (int c = 0; c < g.columns; ++c) sum += source[c];
            by_block[unit] = sum;
          }
          __syncthreads();
#pragma unroll
          for (int e = 0; e < kCells; ++e) {
            const int cell = e * kThreads + threadIdx.x;
            if (cell < g.tiles * g.tile_blocks) {
              const float *source = by_block + cell / g.tile_blocks * g.tile_rows * g.tile_blocks + cell % g.tile_blocks;
              float sum = 0.f;
              for (int r = 0; r < g.tile_rows; ++r) sum += source[r * g.tile_blocks];
              sums[e] += sum;
            }
          }
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kCells; ++e) {
      const int cell = e * kThreads + threadIdx.x;
      const int t = row_group * g.tiles + cell / g.tile_blocks;
      const int64_t block = int64_t(key_group) * g.blocks + cell % g.tile_blocks;
      if (cell < g.tiles * g.tile_blocks && t < s.tiles && block < p.blocks && block * s.block_k <= last_position(t))
        p.mass[((int64_t(batch) * in.heads + head) * p.mass_rows + t) * p.blocks + block] = sums[e];
    }
  }
}

__global__ void __launch_bounds__(kThreads) slash_kernel(const SlashParams p) {
  const int u = blockIdx.x * kThreads + threadIdx.x, head = blockIdx.y, batch = blockIdx.z;
  if (u >= p.blocks || (p.only != nullptr && p.only[batch] == 0)) return;
  const int64_t at = int64_t(batch) * p.heads + head;
  p.mass[(at * 2 + 1) * p.blocks + u] = static_cast<float>(p.slash[at * p.blocks + u] * (1.0 / 8589934592.0));
}

}  // namespace

cudaError_t launch_weigh(const WeighParams &p, cudaStream_t stream) {
  return launch(weigh_kernel, dim3((p.in.keys + kThreads / 32 - 1) / (kThreads / 32), p.in.kv_heads, p.in.batch), kThreads, 0, stream, p);
}

cudaError_t launch_rows(const RowsParams &p, int multiprocessors, cudaStream_t stream) {
  const int64_t items = int64_t(p.in.batch) * p.in.heads * p.sample.classes * ((p.sample.slots + kTile - 1) / kTile);
  return launch(rows_kernel, dim3(grid_of(items, p.in.only, multiprocessors)), kThreads, 0, stream, p);
}

cudaError_t launch_mass(const MassParams &p, int multiprocessors, cudaStream_t stream) {
  const Grouping g(p.sample, p.blocks);
  const int64_t items = int64_t(p.in.batch) * p.in.heads * g.row_groups * g.key_groups;
  return launch(mass_kernel, dim3(grid_of(items, p.in.only, multiprocessors)), kThreads, 0, stream, p);
}

cudaError_t launch_slash(const SlashParams &p, cudaStream_t stream) {
  return launch(slash_kernel, dim3((p.blocks + kThreads - 1) / kThreads, p.heads, p.batch), kThreads, 0, stream, p);
}

}  // namespace sample_attention::generic

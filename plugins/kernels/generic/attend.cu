// Attention over block lists or over every key, and split-key decode: online softmax over 64 x 64 score tiles in float32, probabilities included.
#include "score.cuh"

namespace sample_attention::generic {
namespace {

constexpr int kSlabs = 4;  // of 64 value columns: Dv up to 256

// What the threads of an item look up: kept in shared memory, because the accumulators need the registers.
struct Item {
  int head, batch, kv_head, row0, split;
  int begin, end;          // entries of the key sequence: list entries times keys of a block, or the keys themselves
  const int32_t *indices;  // of the tile, or null
};

// How the rows of a launch are cut into items.
struct Cut {
  int heads, group, packed;  // heads of the items; query heads a key/value head; rows of a head
  int rows, first_row, all_rows, row_tiles, splits;

  Cut() = default;
  __device__ __forceinline__ Cut(const AttendParams &p, bool decode) {
    const bool listed = !decode && p.counts != nullptr;
    heads = decode ? p.in.kv_heads : p.in.heads;
    group = p.in.heads / p.in.kv_heads;
    packed = decode ? group * p.in.queries : p.in.queries;
    rows = listed && p.block_q < kTile ? p.block_q : kTile;
    first_row = listed ? p.first_tile * p.block_q : 0;
    all_rows = listed ? min(p.list_tiles * p.block_q, packed - first_row) : packed;
    row_tiles = (all_rows + rows - 1) / rows;
    splits = decode ? p.splits : 1;
  }
};

// kDecode: an item is 64 packed rows (query head of the group * S + query row) of a key/value head against one range of keys.
template <bool kDecode>
__global__ void __launch_bounds__(kThreads, 2) attend_kernel(const AttendParams p) {
  __shared__ Tile tile;
  alignas(16) __shared__ float probability[kTile * kPitch];  // [key][row]
  __shared__ int keys[kTile], position[kTile];
  __shared__ float rescale[kTile];
  __shared__ int64_t value_at[kTile];
  __shared__ Item shared;
  __shared__ Cut cut;
  const Inputs &in = p.in;
  if (nothing_to_do(in)) return;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const bool listed = !kDecode && p.counts != nullptr;
  if (threadIdx.x == 0) cut = Cut(p, kDecode);
  __syncthreads();

  for (unsigned turn = 0;; ++turn) {
    const int64_t index = int64_t(turn) * gridDim.x + blockIdx.x;
    if (index >= int64_t(in.batch) * cut.heads * cut.row_tiles * cut.splits) break;
    // The last tiles see the most keys: they start first.
    const int row_tile = cut.row_tiles - 1 - static_cast<int>(index / cut.splits % cut.row_tiles);
    const int unit = static_cast<int>(index / cut.splits / cut.row_tiles);
    if (in.only != nullptr && in.only[unit / cut.heads] == 0) continue;
    __syncthreads();
    if (threadIdx.x < kTile) {
      const int head = unit % cut.heads, batch = unit / cut.heads;
      const int row0 = cut.first_row + row_tile * cut.rows, packed_row = row0 + threadIdx.x;
      const bool inside = static_cast<int>(threadIdx.x) < cut.rows && packed_row < cut.first_row + cut.all_rows;
      const int query_head = kDecode ? head * cut.group + packed_row / in.queries : head, row = kDecode ? packed_row % in.queries : packed_row;
      position[threadIdx.x] = inside ? in.keys - in.queries + row : -1;
      tile.query_at[threadIdx.x] = inside ? batch * in.query.b + query_head * in.query.h + row * in.query.s : -1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int last = -1;
      for (int r = 0; r < kTile; ++r) last = max(last, position[r]);
      Item i{unit % cut.heads,
             unit / cut.heads,
             kDecode ? unit % cut.heads : unit % cut.heads / cut.group,
             cut.first_row + row_tile * cut.rows,
             static_cast<int>(index % cut.splits),
             0,
             0,
             nullptr};
      const Real real(in, i.batch);
      if (listed) {
        const int64_t at = (int64_t(i.batch) * in.heads + i.head) * p.list_tiles + (i.row0 - cut.first_row) / p.block_q;
        i.indices = p.indices + at * p.capacity;
        i.end = p.counts[at] * p.block_k;
      } else {
        const int begin = real.first / kTile * kTile, end = max(min(real.end, last + 1), begin);
        const int range = ((end - begin + cut.splits - 1) / cut.splits + kTile - 1) / kTile * kTile;
        i.begin = begin + i.split * range;
        i.end = min(i.begin + range, end);
      }
      shared = i;
    }
    __syncthreads();

    float out[kSlabs][4][4], top[4], sum[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      top[r] = -kInfinity;
      sum[r] = 0.f;
#pragma unroll
      for (int d = 0; d < kSlabs; ++d) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[d][r][c] = 0.f;
      }
    }
    for (int n = shared.begin; n < shared.end; n += kTile) {
      __syncthreads();
      if (threadIdx.x < kTile) {
        const Item &i = shared;
        const Real real(in, i.batch);
        const int entry = n + threadIdx.x;
        int j = entry < i.end ? entry : in.keys;
        if (listed && entry < i.end) j = i.indices[entry / p.block_k] * p.block_k + entry % p.block_k;
        const bool inside = j < in.keys && real.has(j);
        keys[threadIdx.x] = inside ? j : in.keys;
        tile.key_at[threadIdx.x] = inside ? i.batch * in.key.b + i.kv_head * in.key.h + j * in.key.s : -1;
        value_at[threadIdx.x] = inside ? i.batch * in.value.b + i.kv_head * in.value.h + j * in.value.s : -1;
      }
      Scores scores = score<true>(tile, in, probability);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row_position = position[4 * y + r];
        float peak = top[r];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (keys[4 * x + c] > row_position) scores.at[r][c] = -kInfinity;
          peak = fmaxf(peak, scores.at[r][c]);
        }
        peak = row_max(peak);
        const float base = peak == -kInfinity ? 0.f : peak;
        const float factor = expf(top[r] - base);
        if (x == 0) rescale[4 * y + r] = factor;
        top[r] = peak;
        sum[r] *= factor;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          scores.at[r][c] = expf(scores.at[r][c] - base);
          sum[r] += scores.at[r][c];
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        own_cells(probability, c) = make_float4(scores.at[0][c], scores.at[1][c], scores.at[2][c], scores.at[3][c]);
      }
#pragma unroll
      for (int d = 0; d < kSlabs; ++d) {
        if (d * kTile < in.value_dim) {
          // The slabs of query and key become one of 64 keys x 64 value columns.
          __syncthreads();
          float *values = tile.slabs;
#pragma unroll 4
          for (int e = 0; e < kTile * kTile / kThreads; ++e) {
            const int key = e * 4 + threadIdx.x / kTile, column = threadIdx.x % kTile;
            const int64_t offset = value_at[key];
            values[key * kPitch + column] = offset >= 0 && d * kTile + column < in.value_dim ? load(in.value.data, offset + d * kTile + column, in.dtype) : 0.f;
          }
          __syncthreads();
          Scores part;
          multiply<kTile>(part, probability, values);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int c = 0; c < 4; ++c) out[d][r][c] = fmaf(out[d][r][c], rescale[4 * y + r], part.at[r][c]);
          }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float total = row_sum(sum[r]);
      if (position[4 * y + r] < 0) continue;
      const int packed_row = shared.row0 + 4 * y + r, batch = shared.batch;
      const int query_head = kDecode ? shared.head * cut.group + packed_row / in.queries : shared.head, row = kDecode ? packed_row % in.queries : packed_row;
      const int64_t at = (int64_t(batch) * in.heads + query_head) * in.queries + row;
      const int64_t part = kDecode ? int64_t(shared.split) * in.batch * in.heads * in.queries + at : 0;
      const float lse = total == 0.f ? -kInfinity : (top[r] == -kInfinity ? 0.f : top[r]) + logf(total);
#pragma unroll
      for (int d = 0; d < kSlabs; ++d) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int column = d * kTile + 4 * x + c;
          if (column >= in.value_dim) continue;
          const float value = total == 0.f ? 0.f : out[d][r][c] / total;
          if (kDecode)
            p.partial[part * in.value_dim + column] = value;
          else
            store(p.output, batch * p.output_b + query_head * p.output_h + row * p.output_s + column, in.dtype, value);
        }
      }
      if (x == 0 && kDecode) p.partial_lse[part] = lse;
      if (x == 0 && !kDecode && p.lse != nullptr) p.lse[at] = lse;
    }
  }
}

// One thread block a row: joins the key ranges of decode.
__global__ void __launch_bounds__(kTile) join_kernel(const AttendParams p) {
  const Inputs &in = p.in;
  const int row = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  if (in.only != nullptr && in.only[batch] == 0) return;
  const int64_t at = (int64_t(batch) * in.heads + head) * in.queries + row;
  const int64_t rows = int64_t(in.batch) * in.heads * in.queries;
  float peak = -kInfinity, sum = 0.f;
  for (int s = 0; s < p.splits; ++s) peak = fmaxf(peak, p.partial_lse[s * rows + at]);
  const float base = peak == -kInfinity ? 0.f : peak;
  for (int s = 0; s < p.splits; ++s) sum += expf(p.partial_lse[s * rows + at] - base);
  for (int d = threadIdx.x; d < in.value_dim; d += kTile) {
    float total = 0.f;
    for (int s = 0; s < p.splits; ++s) total += expf(p.partial_lse[s * rows + at] - base) * p.partial[(s * rows + at) * in.value_dim + d];
    store(p.output, batch * p.output_b + head * p.output_h + row * p.output_s + d, in.dtype, sum == 0.f ? 0.f : total / sum);
  }
  if (p.lse != nullptr && threadIdx.x == 0) p.lse[at] = sum == 0.f ? -kInfinity : base + logf(sum);
}

}  // namespace

cudaError_t launch_attend(const AttendParams &p, int multiprocessors, cudaStream_t stream) {
  const int rows = p.counts != nullptr && p.block_q < kTile ? p.block_q : kTile;
  const int64_t all_rows = p.counts != nullptr ? int64_t(p.list_tiles) * p.block_q : p.in.queries;
  const int64_t items = int64_t(p.in.batch) * p.in.heads * ((all_rows + rows - 1) / rows);
  return launch(attend_kernel<false>, dim3(grid_of(items, p.in.only, multiprocessors)), kThreads, 0, stream, p);
}

cudaError_t launch_decode(const AttendParams &p, int multiprocessors, cudaStream_t stream) {
  const int64_t packed = int64_t(p.in.heads / p.in.kv_heads) * p.in.queries;
  const int64_t items = int64_t(p.in.batch) * p.in.kv_heads * ((packed + kTile - 1) / kTile) * p.splits;
  cudaError_t error = launch(attend_kernel<true>, dim3(grid_of(items, p.in.only, multiprocessors)), kThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  return launch(join_kernel, dim3(p.in.queries, p.in.heads, p.in.batch), kTile, 0, stream, p);
}

}  // namespace sample_attention::generic

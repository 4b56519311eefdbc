// Sampling with mma.sync and cp.async: block masses of `residue` and `tile`, compute capability 8.0 and newer.
//
// All three kernels are Q K^T over strided slices: a work item has 128 slice rows, four warps of 32, whose query fragments stay in registers while tiles
// of 128 slice keys pass through two slots.
//   rows  : one slice and all of its keys; the log-sum-exp of each row.
//   mass  : 128 slice keys and all slices; the sum over slices of exp2(score - lse) * weight stays in registers and is reduced once over the rows of a tile and
//           the keys of a block. Follows `rows`.
//   blocks: `tile` in one pass. Each row keeps the logarithm of its weighted sum over every piece of up to 64 keys, against its running maximum; once the
//           row's own log-sum-exp is known, the pieces are normalised and reduced. The pieces belong to the thread block, so they stay in L2.
// No atomics on floats: the masses do not depend on the order of work.
#pragma once

#include "../common/launch.cuh"
#include "../common/logits.cuh"
#include "../common/tile_sm80.cuh"
#include "sample_sm80_params.h"

#include <cuda_runtime_api.h>

namespace sample_attention {

// kWarps_ warps, 4 of them side by side over the rows; two slots of 128 keys. kApart_: the queries have a place of their own; else they arrive in the second
// slot, and leave it for the registers before its keys come.
template <class Element_, int kHeadDim_, int kWarps_, bool kApart_>
struct SampleSm80Traits {
  using Element = Element_;
  using Rows = sm80::TileRows<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kSampleSm80Rows;
  static constexpr int kBlockN = 128;
  static constexpr int kThreads = 32 * kWarps_;
  static constexpr int kSlots = 2;
  static constexpr int kQueryBytes = kRows * Rows::kRowBytes;
  static constexpr int kSlotBytes = kBlockN * Rows::kRowBytes;
  static constexpr int kFirstSlot = kApart_ ? kQueryBytes : 0;
  static constexpr int kQueryPlace = kApart_ ? 0 : kSlotBytes;
  static constexpr int kRingBytes = kFirstSlot + kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kRingBytes + kSlots * kBlockN * 4 + 16;
  static_assert(kSharedBytes <= 99 * 1024, "a thread block of GA10x and Ada has 99 KiB of shared memory");
};

// Two thread blocks share an SM of A100, H100 and H200.
template <class Element, int kHeadDim>
using SampleRowsSm80 = SampleSm80Traits<Element, kHeadDim, 4, false>;
// One thread block an SM: its two halves take 64 of the 128 keys each, which leaves registers for the sums.
template <class Element, int kHeadDim>
using SampleMassSm80 = SampleSm80Traits<Element, kHeadDim, 8, true>;

namespace sample_sm80_detail {

// One slice of one row group, in slice coordinates.
struct Slice {
  int row0, row_limit;  // slice rows row0 .. row_limit - 1 exist (row_limit <= row0: none)
  int row_residue, key_residue;
  int key_low, key_high;  // slice keys that are real: key_low .. key_high
  int first_real, last_real, shift;

  __device__ __forceinline__ Slice(const SampleSm80Params &p, int batch, int group, int slice) {
    const bool cut = group >= p.full_groups;
    const int base = p.first_tile << p.tile_rows_log2;
    row0 = base + (cut ? p.full_rows : group * kSampleSm80Rows);
    const int limit = cut ? base + (p.tiles << p.tile_rows_log2) : base + p.full_rows;
    const int row_stride = 1 << p.row_log2;
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

  __device__ __forceinline__ int position(const SampleSm80Params &p, int row) const { return shift + row_residue + (row << p.row_log2); }

  // Last slice key that a row may see.
  __device__ __forceinline__ int key_end(const SampleSm80Params &p, int row) const { return min((position(p, row) - key_residue) >> p.key_log2, key_high); }

  // Key tiles that meet some row: first, and how many.
  __device__ __forceinline__ void key_tiles(const SampleSm80Params &p, int width, int &first, int &count) const {
    first = key_low / width;
    count = 0;
    if (row_limit <= row0) return;
    const int end = key_end(p, min(row_limit, row0 + kSampleSm80Rows) - 1);
    if (end >= key_low) count = end / width + 1 - first;
  }
};

__device__ __forceinline__ bool full_head(const SampleSm80Params &p, int head) { return (p.alpha != nullptr ? p.alpha[head] : p.alpha_all) >= 1.f; }

// Position of the last row of a group, over all slices.
__device__ __forceinline__ int group_end(const SampleSm80Params &p, int group) {
  const int tiles_before = group >= p.full_groups ? p.tiles : min((group + 1) * (kSampleSm80Rows >> p.tile_rows_log2), p.tiles);
  const int rows = (p.first_tile + tiles_before) << (p.tile_rows_log2 + p.row_log2);
  return p.keys - p.queries + min(rows, p.queries) - 1;
}

// Work item number -> (batch, head, inner index, group): heads that share keys are neighbours, the longest rows come first.
struct Item {
  int batch, head, kv_head, inner, group;

  __device__ __forceinline__ Item(const SampleSm80Params &p, int item, int inners) {
    const int heads = p.heads / p.kv_heads, per_kv = heads * inners * p.groups;
    const int kv = item / per_kv, rest = item % per_kv;
    batch = kv / p.kv_heads;
    kv_head = kv % p.kv_heads;
    head = kv_head * heads + rest % heads;
    inner = rest / heads % inners;
    group = p.groups - 1 - rest / (heads * inners);
  }
};

// The shared memory of a thread block, and the copies into it.
template <class Traits>
struct Stage {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  static constexpr int kRowsAPass = Traits::kThreads / Rows::kPieces;
  static_assert(kRowsAPass % 8 == 0, "every row that a thread copies has the same swizzle");
  unsigned char *shared;
  uint32_t base;

  __device__ __forceinline__ explicit Stage(unsigned char *memory) : shared(memory), base(sm80::shared_address(memory)) {}
  __device__ __forceinline__ uint32_t slot(int s) const { return base + Traits::kFirstSlot + s * Traits::kSlotBytes; }
  __device__ __forceinline__ float *weight(int s) const { return reinterpret_cast<float *>(shared + Traits::kRingBytes) + s * Traits::kBlockN; }
  __device__ __forceinline__ int *item() const { return reinterpret_cast<int *>(weight(Traits::kSlots)); }

  // Slice rows first .. first + kCount - 1 of a tensor; zeros outside low .. high - 1.
  template <int kCount>
  __device__ __forceinline__ void copy(uint32_t target, const Element *source, int64_t stride, int residue, int log2, int first, int low, int high) const {
    const int own_row = threadIdx.x / Rows::kPieces, piece = threadIdx.x % Rows::kPieces;
    source += piece * 8;
#pragma unroll 2
    for (int i = 0; i < kCount / kRowsAPass; ++i) {
      const int row = first + i * kRowsAPass + own_row;
      const bool inside = row >= low && row < high;
      sm80::copy_16(target + Rows::at(own_row, piece) + i * kRowsAPass * Rows::kRowBytes, source + (inside ? (residue + (row << log2)) * stride : 0), inside);
    }
  }

  __device__ __forceinline__ void copy_queries(const SampleSm80Params &p, const Item &item, const Slice &slice) const {
    const Element *query = static_cast<const Element *>(p.query) + item.batch * p.query_b + item.head * p.query_h;
    copy<Traits::kRows>(base + Traits::kQueryPlace, query, p.query_s, slice.row_residue, p.row_log2, slice.row0, slice.row0, slice.row_limit);
  }

  __device__ __forceinline__ void copy_keys(const SampleSm80Params &p, const Item &item, const Slice &slice, int s, int first_key) const {
    const Element *key = static_cast<const Element *>(p.key) + item.batch * p.key_b + item.kv_head * p.key_h;
    copy<Traits::kBlockN>(slot(s), key, p.key_s, slice.key_residue, p.key_log2, first_key, slice.key_low, slice.key_high + 1);
  }

  __device__ __forceinline__ void copy_weights(const SampleSm80Params &p, const Item &item, const Slice &slice, int s, int first_key) const {
    if (threadIdx.x < Traits::kBlockN / 4) {
      const int64_t row = ((int64_t(item.batch) * p.kv_heads + item.kv_head) << p.key_log2) + slice.key_residue;
      sm80::copy_16(sm80::shared_address(weight(s) + threadIdx.x * 4), p.weight + row * p.weight_row + first_key + threadIdx.x * 4, true);
    }
  }
};

// Rows of a thread in the item.
__device__ __forceinline__ int row_of(int m, int r) { return threadIdx.x / 32 % 4 * 32 + m * 16 + r * 8 + threadIdx.x % 32 / 4; }

// A warp's 32 query rows as operand A, and their scores against a tile of keys.
template <class Traits>
struct Queries {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  uint32_t a[Rows::kSteps][2][4];

  __device__ __forceinline__ void load(const Stage<Traits> &stage) {
    const uint32_t at = stage.base + Traits::kQueryPlace + threadIdx.x / 32 % 4 * 32 * Rows::kRowBytes + Rows::rows_first(threadIdx.x % 32);
#pragma unroll
    for (int k = 0; k < Rows::kSteps; ++k) {
      sm80::load_matrices(a[k][0], at ^ Rows::step(k));
      sm80::load_matrices(a[k][1], (at ^ Rows::step(k)) + 16 * Rows::kRowBytes);
    }
  }

  // And everybody has done so.
  __device__ __forceinline__ void load_and_leave(const Stage<Traits> &stage) {
    load(stage);
    __syncthreads();
  }

  // Against the kKeys slice keys from first_key on, whose rows begin at `keys`: capped, and -inf where a pair is not allowed.
  template <int kKeys>
  __device__ __forceinline__ void score(float (&scores)[2][kKeys / 8][4], const SampleSm80Params &p, const Slice &slice, uint32_t keys, const LogitScale &logit,
                                        int first_key) const {
    const int lane = threadIdx.x % 32;
    sm80::score_tile<Element, Rows, 2, kKeys / 16>(scores, keys + Rows::columns_first(lane), [&](int k, uint32_t (&fragment)[2][4]) {
#pragma unroll
      for (int e = 0; e < 8; ++e) fragment[e / 4][e % 4] = a[k][e / 4][e % 4];
    });
    if (logit.capped()) {
#pragma unroll
      for (int e = 0; e < kKeys; ++e) {
        float &s = scores[e / (kKeys / 2)][e / 4 % (kKeys / 8)][e % 4];
        s = logit.cap(s);
      }
    }
    if (first_key < slice.key_low || first_key + kKeys - 1 > slice.key_end(p, slice.row0)) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int end = slice.key_end(p, slice.row0 + row_of(m, r));
#pragma unroll
          for (int e = 0; e < kKeys / 4; ++e) {
            const int key = first_key + 8 * (e / 2) + 2 * (lane % 4) + e % 2;
            if (key < slice.key_low || key > end) scores[m][e / 2][2 * r + e % 2] = -INFINITY;
          }
        }
      }
    }
  }
};

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// exp2's offset of a row: a row that has met no key subtracts 0, so that its terms are exp2(-inf) = 0.
__device__ __forceinline__ float shift_of(float peak, const LogitScale &logit) { return peak == -INFINITY ? 0.f : peak * logit.multiplier; }

}  // namespace sample_sm80_detail

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) sample_rows_sm80_kernel(const __grid_constant__ SampleSm80Params p) {
  using namespace sample_sm80_detail;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr int kPart = Traits::kHeadDim <= 64 ? kBlockN : kBlockN / 2;  // keys that the registers hold beside the query
  const Stage<Traits> stage(dynamic_shared());
  const LogitScale logit(p.scale, p.softcap);
  const Item item(p, blockIdx.x, p.classes);
  if (full_head(p, item.head)) return;
  const Slice slice(p, item.batch, item.group, item.inner);
  int first, count;
  slice.key_tiles(p, kBlockN, first, count);

  float row_max[2][2], row_sum[2][2];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    row_max[e / 2][e % 2] = -INFINITY;
    row_sum[e / 2][e % 2] = 0.f;
  }
  if (count > 0) {
    stage.copy_queries(p, item, slice);
    stage.copy_keys(p, item, slice, 0, first * kBlockN);
    sm80::copy_commit();
    Queries<Traits> queries;
    for (int n = 0; n < count; ++n) {
      sm80::copy_wait<0>();
      __syncthreads();  // this tile has landed for every thread; nobody reads the tile before any more
      if (n == 0) queries.load_and_leave(stage);
      if (n + 1 < count) stage.copy_keys(p, item, slice, (n + 1) % 2, (first + n + 1) * kBlockN);
      sm80::copy_commit();
#pragma unroll
      for (int part = 0; part < kBlockN / kPart; ++part) {
        float scores[2][kPart / 8][4];
        queries.template score<kPart>(scores, p, slice, stage.slot(n % 2) + part * kPart * Traits::Rows::kRowBytes, logit,
                                      (first + n) * kBlockN + part * kPart);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            // Each thread keeps its own columns' maximum: the four threads of a row meet once, at the end.
            float peak = row_max[m][r];
#pragma unroll
            for (int j = 0; j < kPart / 8; ++j) peak = fmaxf(peak, fmaxf(scores[m][j][2 * r], scores[m][j][2 * r + 1]));
            const float shift = shift_of(peak, logit);
            float sum = row_sum[m][r] * ptx::exp2_fast(row_max[m][r] * logit.multiplier - shift);
            row_max[m][r] = peak;
#pragma unroll
            for (int j = 0; j < kPart / 8; ++j) {
              sum += ptx::exp2_fast(fmaf(scores[m][j][2 * r], logit.multiplier, -shift));
              sum += ptx::exp2_fast(fmaf(scores[m][j][2 * r + 1], logit.multiplier, -shift));
            }
            row_sum[m][r] = sum;
          }
        }
      }
    }
  }
  const int64_t out = (((int64_t(item.batch) * p.heads + item.head) * p.classes + item.inner) * p.groups + item.group) * Traits::kRows;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float peak = quad_max(row_max[m][r]), shift = shift_of(peak, logit);
      const float sum = quad_sum(row_sum[m][r] * ptx::exp2_fast(row_max[m][r] * logit.multiplier - shift));
      const int row = row_of(m, r), position = slice.position(p, slice.row0 + row);
      const bool real = slice.row0 + row < slice.row_limit && position >= slice.first_real && position < slice.last_real;
      if (threadIdx.x % 4 == 0) p.lse[out + row] = real && sum != 0.f ? shift + log2f(sum) : INFINITY;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) sample_mass_sm80_kernel(const __grid_constant__ SampleSm80Params p) {
  using namespace sample_sm80_detail;
  constexpr int kKeys = Traits::kBlockN, kHalf = kKeys / 2;
  unsigned char *shared = dynamic_shared();
  const Stage<Traits> stage(shared);
  const LogitScale logit(p.scale, p.softcap);
  const int key_groups = (((p.keys - 1) >> p.key_log2) + kKeys) / kKeys;  // of the longest slice
  const Item item(p, blockIdx.x, key_groups);
  const int first_key = item.inner * kKeys;
  if (full_head(p, item.head) || int64_t(first_key) << p.key_log2 > group_end(p, item.group)) return;
  const int half = threadIdx.x / 128;
  const float *group_lse = p.lse + ((int64_t(item.batch) * p.heads + item.head) * p.classes * p.groups + item.group) * Traits::kRows;

  auto copy = [&](int c) {
    const Slice slice(p, item.batch, item.group, c);
    stage.copy_queries(p, item, slice);
    stage.copy_keys(p, item, slice, c % 2, first_key);
    stage.copy_weights(p, item, slice, c % 2, first_key);
    sm80::copy_commit();
  };
  // The sums of a thread's column pairs.
  float mass[2][2][kHalf / 8] = {};
  copy(0);
  for (int c = 0; c < p.classes; ++c) {
    const Slice slice(p, item.batch, item.group, c);
    sm80::copy_wait<0>();
    __syncthreads();  // queries and keys have landed for every thread
    Queries<Traits> queries;
    queries.load(stage);
    float lse[2][2];
#pragma unroll
    for (int e = 0; e < 4; ++e) lse[e / 2][e % 2] = group_lse[int64_t(c) * p.groups * Traits::kRows + row_of(e / 2, e % 2)];
    __syncthreads();  // the queries are in registers, and nobody reads the keys before
    if (c + 1 < p.classes) copy(c + 1);
    float scores[2][kHalf / 8][4];
    queries.template score<kHalf>(scores, p, slice, stage.slot(c % 2) + half * kHalf * Traits::Rows::kRowBytes, logit, first_key + half * kHalf);
#pragma unroll
    for (int j = 0; j < kHalf / 8; ++j) {
      const float2 w = *reinterpret_cast<const float2 *>(stage.weight(c % 2) + half * kHalf + 8 * j + 2 * (threadIdx.x % 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = e / 2, r = e % 2;
        float &v = mass[m][r][j];
        v = fmaf(ptx::exp2_fast(fmaf(scores[m][j][2 * r], logit.multiplier, -lse[m][r])), w.x, v);
        v = fmaf(ptx::exp2_fast(fmaf(scores[m][j][2 * r + 1], logit.multiplier, -lse[m][r])), w.y, v);
      }
    }
  }
  __syncthreads();

  // Column pairs of each row through shared memory: first over the keys of a block (a thread a row), then over the rows of a tile.
  constexpr int kPairs = kKeys / 2, kPitch = kPairs + 1;
  static_assert(Traits::kRows * kPitch * 4 <= Traits::kRingBytes);
  float *sums = reinterpret_cast<float *>(shared);
#pragma unroll
  for (int e = 0; e < 4 * kHalf / 8; ++e) {
    const int m = e / (2 * kHalf / 8), r = e / (kHalf / 8) % 2, j = e % (kHalf / 8);
    sums[row_of(m, r) * kPitch + half * (kHalf / 2) + 4 * j + threadIdx.x % 4] = mass[m][r][j];
  }
  __syncthreads();
  const int pairs = 1 << (p.block_keys_log2 - 1), columns = kPairs / pairs;  // of a block, of the item
  if (threadIdx.x < Traits::kRows) {
    float *own = sums + threadIdx.x * kPitch;
    for (int column = 0; column < columns; ++column) {
      float v = 0.f;
      for (int i = 0; i < pairs; ++i) v += own[column * pairs + i];
      own[column] = v;
    }
  }
  __syncthreads();
  const bool cut = item.group >= p.full_groups;
  const int first_tile = (cut ? p.full_rows : item.group * Traits::kRows) >> p.tile_rows_log2;
  const int end_tile = cut ? p.tiles : p.full_rows >> p.tile_rows_log2;  // the tile that is cut short belongs to its own group alone
  const int first_block = first_key >> p.block_keys_log2;
  const int64_t head_row = (int64_t(item.batch) * p.heads + item.head) * p.tiles;
  for (int e = threadIdx.x; e < (Traits::kRows >> p.tile_rows_log2) * columns; e += Traits::kThreads) {
    const int column = e % columns, tile = first_tile + e / columns;
    float v = 0.f;
    for (int r = 0; r < 1 << p.tile_rows_log2; ++r) v += sums[((e / columns << p.tile_rows_log2) + r) * kPitch + column];
    if (tile < end_tile && first_block + column < p.blocks) {
      p.mass[(head_row + tile) * p.blocks + first_block + column] = v;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) sample_blocks_sm80_kernel(const __grid_constant__ SampleSm80Params p) {
  using namespace sample_sm80_detail;
  constexpr int kBlockN = Traits::kBlockN;
  unsigned char *shared = dynamic_shared();
  const Stage<Traits> stage(shared);
  float *row_lse = reinterpret_cast<float *>(shared);  // over the queries, once they are in registers
  const LogitScale logit(p.scale, p.softcap);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int items = p.batch * p.heads * p.groups;
  const int per_piece = 1 << (p.piece_log2 - 4);  // groups of 16 keys: 1, 2 or 4
  float *pieces = p.pieces + int64_t(blockIdx.x) * p.piece_count * Traits::kRows;

  for (int number = blockIdx.x; number < items;) {
    if (threadIdx.x == 0) *stage.item() = gridDim.x + atomicAdd(p.ticket, 1);
    const Item item(p, number, 1);
    const Slice slice(p, item.batch, item.group, 0);
    int first, count;
    slice.key_tiles(p, kBlockN, first, count);
    if (full_head(p, item.head)) count = -1;

    float row_max[2][2], row_sum[2][2];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      row_max[e / 2][e % 2] = -INFINITY;
      row_sum[e / 2][e % 2] = 0.f;
    }
    if (count > 0) {
      stage.copy_queries(p, item, slice);
      stage.copy_keys(p, item, slice, 0, first * kBlockN);
      stage.copy_weights(p, item, slice, 0, first * kBlockN);
      sm80::copy_commit();
      Queries<Traits> queries;
      for (int n = 0; n < count; ++n) {
        sm80::copy_wait<0>();
        __syncthreads();  // this tile has landed for every thread; nobody reads the tile before any more
        if (n == 0) queries.load_and_leave(stage);
        if (n + 1 < count) {
          stage.copy_keys(p, item, slice, (n + 1) % 2, (first + n + 1) * kBlockN);
          stage.copy_weights(p, item, slice, (n + 1) % 2, (first + n + 1) * kBlockN);
        }
        sm80::copy_commit();
        float scores[2][kBlockN / 8][4];
        queries.template score<kBlockN>(scores, p, slice, stage.slot(n % 2), logit, (first + n) * kBlockN);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float peak = row_max[m][r];
#pragma unroll
            for (int j = 0; j < kBlockN / 8; ++j) peak = fmaxf(peak, fmaxf(scores[m][j][2 * r], scores[m][j][2 * r + 1]));
            peak = quad_max(peak);
            const float shift = shift_of(peak, logit);
            float sum = row_sum[m][r] * ptx::exp2_fast(row_max[m][r] * logit.multiplier - shift);
            row_max[m][r] = peak;
            float weighted[kBlockN / 16] = {};  // of 16 keys each
#pragma unroll
            for (int j = 0; j < kBlockN / 8; ++j) {
              const float2 w = *reinterpret_cast<const float2 *>(stage.weight(n % 2) + 8 * j + 2 * (lane % 4));
              const float x = ptx::exp2_fast(fmaf(scores[m][j][2 * r], logit.multiplier, -shift));
              const float y = ptx::exp2_fast(fmaf(scores[m][j][2 * r + 1], logit.multiplier, -shift));
              sum += x + y;
              weighted[j / 2] = fmaf(x, w.x, fmaf(y, w.y, weighted[j / 2]));
            }
            row_sum[m][r] = sum;
#pragma unroll
            for (int q = 0; q < kBlockN / 16; ++q) {
              if ((q & (per_piece - 1)) == 0) {
                float v = weighted[q];
                if (per_piece > 1) v += weighted[q | 1];
                if (per_piece > 2) v += weighted[q | 2] + weighted[q | 3];
                v = quad_sum(v);
                const int piece = ((first + n) * (kBlockN / 16) + q) / per_piece;
                if (lane % 4 == 0) pieces[int64_t(piece) * Traits::kRows + row_of(m, r)] = v == 0.f ? -INFINITY : shift + log2f(v);
              }
            }
          }
        }
      }
    }
    sm80::copy_wait<0>();
    __syncthreads();  // every warp has its queries
                      // Rows without a sample get +inf: their pieces become 0.
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int m = e / 2, r = e % 2, row = row_of(m, r), position = slice.position(p, slice.row0 + row);
      const float sum = quad_sum(row_sum[m][r]);
      const bool real = slice.row0 + row < slice.row_limit && position >= slice.first_real && position < slice.last_real;
      if (lane % 4 == 0) row_lse[row] = real && sum != 0.f ? shift_of(row_max[m][r], logit) + log2f(sum) : INFINITY;
    }
    __syncthreads();
    if (count >= 0) {
      // A warp a key block, four rows a lane: they lie in one query tile.
      const float4 lse = *reinterpret_cast<const float4 *>(row_lse + 4 * lane);
      const bool cut = item.group >= p.full_groups;
      const int tile = ((cut ? p.full_rows : item.group * Traits::kRows) + 4 * lane) >> p.tile_rows_log2;
      const int end_tile = cut ? p.tiles : p.full_rows >> p.tile_rows_log2;
      const int blocks = group_end(p, item.group) / (1 << p.block_keys_log2) + 1;
      const int per_block_log2 = p.block_keys_log2 - p.piece_log2;
      const int low = first * (kBlockN / 16) / per_piece, high = (first + count) * (kBlockN / 16) / per_piece;  // pieces that were written
      float *mass = p.mass + ((int64_t(item.batch) * p.heads + item.head) * p.tiles + tile) * p.blocks;
      constexpr int kAhead = 4;
      for (int base = warp * kAhead; base < blocks; base += 4 * kAhead) {
        float v[kAhead] = {};
        for (int i = 0; i < 1 << per_block_log2; ++i) {
          float4 x[kAhead];
#pragma unroll
          for (int b = 0; b < kAhead; ++b) {
            const int piece = ((base + b) << per_block_log2) + i;
            const bool written = piece >= low && piece < high;
            x[b] = written ? *reinterpret_cast<const float4 *>(pieces + int64_t(piece) * Traits::kRows + 4 * lane)
                           : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
          }
#pragma unroll
          for (int b = 0; b < kAhead; ++b) {
            v[b] += ptx::exp2_fast(x[b].x - lse.x) + ptx::exp2_fast(x[b].y - lse.y);
            v[b] += ptx::exp2_fast(x[b].z - lse.z) + ptx::exp2_fast(x[b].w - lse.w);
          }
        }
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          for (int d = 1; d < 1 << (p.tile_rows_log2 - 2); d *= 2) v[b] += __shfl_xor_sync(~0u, v[b], d);
          if ((4 * lane & ((1 << p.tile_rows_log2) - 1)) == 0 && base + b < blocks && tile < end_tile) mass[base + b] = v[b];
        }
      }
    }
    number = *stage.item();
    __syncthreads();  // the pieces, the log-sum-exps and the item number are read
  }
}

template <class Traits>
cudaError_t launch_sample_rows_sm80(const SampleSm80Params &p, cudaStream_t stream) {
  const int64_t items = int64_t(p.batch) * p.heads * p.classes * p.groups;
  return launch(sample_rows_sm80_kernel<Traits>, dim3(static_cast<unsigned>(items)), Traits::kThreads, Traits::kSharedBytes, stream, p);
}

template <class Traits>
cudaError_t launch_sample_mass_sm80(const SampleSm80Params &p, cudaStream_t stream) {
  const int64_t items = int64_t(p.batch) * p.heads * p.groups * ((((p.keys - 1) >> p.key_log2) + Traits::kBlockN) / Traits::kBlockN);
  return launch(sample_mass_sm80_kernel<Traits>, dim3(static_cast<unsigned>(items)), Traits::kThreads, Traits::kSharedBytes, stream, p);
}

// thread_blocks: as many as `pieces` has room for.
template <class Traits>
cudaError_t launch_sample_blocks_sm80(const SampleSm80Params &p, int thread_blocks, cudaStream_t stream) {
  const int64_t items = int64_t(p.batch) * p.heads * p.groups;
  const unsigned grid = static_cast<unsigned>(items < thread_blocks ? items : thread_blocks);
  return launch(sample_blocks_sm80_kernel<Traits>, dim3(grid), Traits::kThreads, Traits::kSharedBytes, stream, p);
}

}  // namespace sample_attention

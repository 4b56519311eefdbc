// Split-key decode: at most 16 query rows against all keys. Bound by the bytes of K and V, so every byte is read once for all the query heads of a
// key/value head: their rows are packed into the 16 rows of an mma tile (row = head in group * S + query row).
//
// A thread block takes one key range, one key/value head and 16 packed rows. Its four warps are independent: each streams its own 16-key tiles through its
// own ring of shared memory, keeps its own maximum, sum and output, and they meet once at the end. A second kernel joins the ranges.
#pragma once

#include "../common/launch.cuh"
#include "../common/logits.cuh"
#include "../common/mma_sm80.cuh"
#include "../common/pack.cuh"
#include "decode_params.h"

#include <cuda_runtime_api.h>

namespace sample_attention {

template <class Element_, int kHeadDim_>
struct DecodeTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = 16;
  static constexpr int kTile = 16;  // keys of a warp's step: two n-tiles of Q K^T, one k-step of P V
  static constexpr int kWarps = 4;
  // Bytes in flight for each SM at D = 128: 2 blocks x 4 warps x 2 stages ahead x 8 KiB = 128 KiB, against 36 KiB that 4.8 TB/s at 1 us asks for.
  static constexpr int kStages = 3;
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte pieces of a row
  static constexpr int kStageBytes = 2 * kTile * kHeadDim * 2;
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  // 128 output registers leave no room for 64 of query at D = 256: the fragments then wait in shared memory, in the order the lanes read them.
  static constexpr bool kQueryInShared = kHeadDim > 128;
  static constexpr int kQueryBytes = kQueryInShared ? kHeadDim / 16 * 32 * 16 : 0;
  static constexpr int kMergeBytes = kWarps * kRows * (kHeadDim + 4) * 4;
  static constexpr int kSharedBytes = kQueryBytes + (kRingBytes > kMergeBytes ? kRingBytes : kMergeBytes);
};

template <class Traits>
__global__ void __launch_bounds__(128) decode_kernel(const DecodeParams p) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim, kTile = Traits::kTile, kChunks = Traits::kChunks, kStages = Traits::kStages;
  unsigned char *shared = dynamic_shared();
  uint4 *query_shared = reinterpret_cast<uint4 *>(shared);
  unsigned char *raw = shared + Traits::kQueryBytes;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = p.heads / p.kv_heads;
  const int packed = group * p.queries;
  const int row_blocks = (packed + 15) / 16;
  const int split = blockIdx.x / row_blocks, row0 = blockIdx.x % row_blocks * 16;
  const int kv_head = blockIdx.y, batch = blockIdx.z;
  const int per_split = ((p.keys + p.splits - 1) / p.splits + 63) / 64 * 64;
  const int begin = min(split * per_split, p.keys), end = min(begin + per_split, p.keys);
  const int first_real = p.bounds != nullptr ? max(p.bounds[2 * batch], 0) : 0;
  const int last_real = p.bounds != nullptr ? min(p.bounds[2 * batch + 1], p.keys) : p.keys;
  const LogitScale logit(p.scale, p.softcap);

  auto head_of = [&](int row) { return kv_head * group + row / p.queries; };
  const Element *key = static_cast<const Element *>(p.key) + batch * p.key_b + kv_head * p.key_h;
  const Element *value = static_cast<const Element *>(p.value) + batch * p.value_b + kv_head * p.value_h;

  // Pieces of 16 bytes are stored at piece ^ f(row), so that the eight rows of an 8 x 8 matrix lie in different banks. Rows of 12 pieces (D = 96) already
  // alternate between the two halves of the banks: two bits of row / 2 suffice there, and keep the piece inside its row.
  const uint32_t ring = sm80::shared_address(raw) + warp * kStages * Traits::kStageBytes;
  auto swizzle = [](int r) { return kChunks % 8 == 0 ? r & 7 : (r >> 1) & 3; };
  auto piece = [&](int stage, int matrix, int r, int c) {
    return ring + stage * Traits::kStageBytes + ((matrix * kTile + r) * kChunks + (c ^ swizzle(r))) * 16;
  };
  auto load = [&](int stage, int first) {
    if (first < end) {
      // Not unrolled whole at D = 256: 32 addresses would not fit beside the output.
#pragma unroll(kHeadDim > 128 ? 2 : kTile * kChunks / 32)
      for (int e = 0; e < kTile * kChunks / 32; ++e) {
        int index = e * 32 + lane, r = index / kChunks, c = index % kChunks;
        bool inside = first + r < end;
        int64_t source = inside ? first + r : first;
        sm80::copy_16(piece(stage, 0, r, c), key + source * p.key_s + c * 8, inside);
        sm80::copy_16(piece(stage, 1, r, c), value + source * p.value_s + c * 8, inside);
      }
    }
    sm80::copy_commit();  // empty groups keep the count of groups in step
  };

  constexpr int kStep = Traits::kWarps * kTile;
  int first = begin + warp * kTile;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s, first + s * kStep);

  const int row[2] = {row0 + lane / 4, row0 + lane / 4 + 8};
  int last_key[2];
  const Element *query_row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    bool inside = row[r] < packed;
    last_key[r] = inside ? p.keys - p.queries + row[r] % p.queries : -1;
    query_row[r] = inside ? static_cast<const Element *>(p.query) + batch * p.query_b + head_of(row[r]) * p.query_h + row[r] % p.queries * p.query_s : nullptr;
  }
  // Operand A of mma: (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8), two columns a register.
  auto read_query = [&](int k, uint32_t (&fragment)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Element *source = query_row[e % 2];
      fragment[e] = source != nullptr ? *reinterpret_cast<const uint32_t *>(source + 16 * k + 8 * (e / 2) + 2 * (lane % 4)) : 0u;
    }
  };
  uint32_t query[Traits::kQueryInShared ? 1 : kHeadDim / 16][4];
  if constexpr (Traits::kQueryInShared) {
    for (int k = warp; k < kHeadDim / 16; k += Traits::kWarps) {
      uint32_t fragment[4];
      read_query(k, fragment);
      query_shared[k * 32 + lane] = make_uint4(fragment[0], fragment[1], fragment[2], fragment[3]);
    }
    __syncthreads();
  } else {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) read_query(k, query[k]);
  }

  float out[kHeadDim / 8][4];
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[n][e] = 0.f;
  }
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};

  for (int stage = 0; first < end; first += kStep) {
    sm80::copy_wait<kStages - 2>();
    __syncwarp();
    load(stage == 0 ? kStages - 1 : stage - 1, first + (kStages - 1) * kStep);

    float scores[2][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t b[4];
      sm80::load_matrices(b, piece(stage, 0, lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      if constexpr (Traits::kQueryInShared) {
        sm80::load_shared(query[0], sm80::shared_address(query_shared + k * 32 + lane));
      }
      const auto &a = query[Traits::kQueryInShared ? 0 : k];
      sm80::mma<Element>(scores[0], a, b[0], b[1]);
      sm80::mma<Element>(scores[1], a, b[2], b[3]);
    }
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float peak = row_max[r];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float &s = scores[e / 2][2 * r + e % 2];
        int j = first + 8 * (e / 2) + 2 * (lane % 4) + e % 2;
        if (logit.capped()) s = logit.cap(s);
        if (j > last_key[r] || j < first_real || j >= last_real || j >= end) s = -INFINITY;
        peak = fmaxf(peak, s);
      }
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
      float shift = peak == -INFINITY ? 0.f : peak * logit.multiplier;
      rescale[r] = ptx::exp2_fast(row_max[r] * logit.multiplier - shift);
      row_max[r] = peak;
      float sum = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float &s = scores[e / 2][2 * r + e % 2];
        s = ptx::exp2_fast(fmaf(s, logit.multiplier, -shift));
        sum += s;
      }
      row_sum[r] = row_sum[r] * rescale[r] + sum;
    }
    const uint32_t probs[4] = {pack<Element>(scores[0][0], scores[0][1]), pack<Element>(scores[0][2], scores[0][3]), pack<Element>(scores[1][0], scores[1][1]),
                               pack<Element>(scores[1][2], scores[1][3])};
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t b[4];
      sm80::load_matrices_transposed(b, piece(stage, 1, lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out[n][e] *= rescale[e / 2];
        out[n + 1][e] *= rescale[e / 2];
      }
      sm80::mma<Element>(out[n], probs, b[0], b[1]);
      sm80::mma<Element>(out[n + 1], probs, b[2], b[3]);
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  sm80::copy_wait<0>();
  __syncthreads();
  ptx::launch_dependents();

  // Join the four warps.
  constexpr int kRow = kHeadDim + 4;  // maximum and sum behind the output, padded against bank conflicts
  float *merge = reinterpret_cast<float *>(raw);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
    row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
    float *target = merge + (warp * 16 + lane / 4 + 8 * r) * kRow;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      target[8 * n + 2 * (lane % 4)] = out[n][2 * r];
      target[8 * n + 2 * (lane % 4) + 1] = out[n][2 * r + 1];
    }
    if (lane % 4 == 0) {
      target[kHeadDim] = row_max[r];
      target[kHeadDim + 1] = row_sum[r];
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < 16 * kHeadDim; e += 128) {
    int r = e / kHeadDim, d = e % kHeadDim;
    if (row0 + r >= packed) continue;
    float peak = -INFINITY;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) peak = fmaxf(peak, merge[(w * 16 + r) * kRow + kHeadDim]);
    float shift = peak == -INFINITY ? 0.f : peak * logit.multiplier;
    float sum = 0.f, total = 0.f;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      const float *source = merge + (w * 16 + r) * kRow;
      float weight = ptx::exp2_fast(source[kHeadDim] * logit.multiplier - shift);
      sum += weight * source[kHeadDim + 1];
      total += weight * source[d];
    }
    int64_t at = ((int64_t(split) * p.batch + batch) * p.heads + head_of(row0 + r)) * p.queries + (row0 + r) % p.queries;
    p.partial[at * kHeadDim + d] = sum == 0.f ? 0.f : total / sum;
    if (d == 0) p.partial_lse[at] = sum == 0.f ? -INFINITY : shift + log2f(sum);
  }
}

// One thread block a row, one thread a column.
template <class Traits>
__global__ void __launch_bounds__(Traits::kHeadDim) join_kernel(const DecodeParams p) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  const int row = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, d = threadIdx.x;
  const int64_t at = (int64_t(batch) * p.heads + head) * p.queries + row;
  const int64_t rows = int64_t(p.batch) * p.heads * p.queries;
  ptx::wait_for_primary();
  float peak = -INFINITY;
  for (int s = 0; s < p.splits; ++s) peak = fmaxf(peak, p.partial_lse[s * rows + at]);
  float shift = peak == -INFINITY ? 0.f : peak, sum = 0.f, total = 0.f;
  for (int s = 0; s < p.splits; ++s) {
    float weight = ptx::exp2_fast(p.partial_lse[s * rows + at] - shift);
    sum += weight;
    total += weight * p.partial[(s * rows + at) * kHeadDim + d];
  }
  Element *output = static_cast<Element *>(p.output) + batch * p.output_b + head * p.output_h + row * p.output_s;
  output[d] = Element(sum == 0.f ? 0.f : total / sum);
  if (p.lse != nullptr && d == 0) p.lse[at] = sum == 0.f ? -INFINITY : (shift + log2f(sum)) * kLn2;
}

template <class Traits>
cudaError_t launch_decode(const DecodeParams &p, cudaStream_t stream) {
  unsigned row_blocks = (p.heads / p.kv_heads * p.queries + 15) / 16;
  cudaError_t error = launch(decode_kernel<Traits>, dim3(p.splits * row_blocks, p.kv_heads, p.batch), 128, Traits::kSharedBytes, stream, p);
  if (error != cudaSuccess) return error;
  return launch(join_kernel<Traits>, dim3(p.queries, p.heads, p.batch), Traits::kHeadDim, 0, stream, p, p.early != 0);
}

}  // namespace sample_attention

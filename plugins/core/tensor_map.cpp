#include "tensor_map.h"

#include "status.h"

#include <cudaTypedefs.h>

#include <atomic>

namespace sample_attention {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static std::atomic<void *> cached{nullptr};
  void *function = cached.load(std::memory_order_acquire);
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      return nullptr;
    cached.store(function, std::memory_order_release);
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

Status encode(CUtensorMap *map, const sa_tensor &tensor, const MapShape &shape, int rank, const cuuint64_t *dims, const cuuint64_t *strides,
              const cuuint32_t *box) {
  auto function = encoder();
  if (function == nullptr) return fail(SA_CUDA_ERROR, "The driver has no cuTensorMapEncodeTiled; a driver for CUDA 12.0 or newer is needed.");
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  auto type = shape.dtype == SA_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  auto swizzle = box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  CUresult result = function(map, type, rank, tensor.data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return fail(SA_CUDA_ERROR, "cuTensorMapEncodeTiled refused a tensor of head size %d, stride %lld and address %p (driver code %d).", shape.head_dim,
                static_cast<long long>(tensor.stride_s), tensor.data, static_cast<int>(result));
  return {};
}

cuuint32_t slab(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

// A stride that is never stepped over (a dimension of 1) may hold anything; the encoder still wants a valid one.
cuuint64_t stride_bytes(int64_t elements, int extent, int64_t fallback) { return static_cast<cuuint64_t>((extent > 1 ? elements : fallback) * 2); }

}  // namespace

Status encode_rows(CUtensorMap *map, const sa_tensor &t, const MapShape &s, int rows, int box_rows) {
  int64_t row = rows > 1 ? t.stride_s : s.head_dim;
  const cuuint64_t dims[4] = {cuuint64_t(s.head_dim), cuuint64_t(rows), cuuint64_t(s.heads), cuuint64_t(s.batch)};
  const cuuint64_t strides[3] = {cuuint64_t(row) * 2, stride_bytes(t.stride_h, s.heads, row), stride_bytes(t.stride_b, s.batch, row)};
  const cuuint32_t box[4] = {slab(s.head_dim), cuuint32_t(box_rows), 1, 1};
  return encode(map, t, s, 4, dims, strides, box);
}

Status encode_slices(CUtensorMap *map, const sa_tensor &t, const MapShape &s, int stride, int residues, int rows, int box_rows) {
  int64_t row = t.stride_s;
  const cuuint64_t dims[5] = {cuuint64_t(s.head_dim), cuuint64_t(residues), cuuint64_t(rows), cuuint64_t(s.heads), cuuint64_t(s.batch)};
  const cuuint64_t strides[4] = {cuuint64_t(row) * 2, cuuint64_t(row) * stride * 2, stride_bytes(t.stride_h, s.heads, row),
                                 stride_bytes(t.stride_b, s.batch, row)};
  const cuuint32_t box[5] = {slab(s.head_dim), 1, cuuint32_t(box_rows), 1, 1};
  return encode(map, t, s, 5, dims, strides, box);
}

}  // namespace sample_attention

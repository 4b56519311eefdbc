// The few CUDA runtime and driver calls of the core, for the emulator: one device of compute capability 9.0 with three multiprocessors.
#include "overlay_ptx.cuh"

#include <cudaTypedefs.h>

namespace {

CUresult encode_tiled(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *base, const cuuint64_t *dims, const cuuint64_t *strides,
                      const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill) {
  // The driver's own demands.
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (dims[d] == 0 || dims[d] > (uint64_t(1) << 32) || box[d] == 0 || box[d] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (d > 0 && (strides[d - 1] == 0 || strides[d - 1] % 16 != 0 || strides[d - 1] >= (uint64_t(1) << 40))) return CUDA_ERROR_INVALID_VALUE;
  }
  emulator::Map m{};
  m.base = static_cast<char *>(base);
  m.rank = int(rank);
  std::copy(dims, dims + rank, m.dims);
  std::copy(strides, strides + rank - 1, m.strides);
  std::copy(box, box + rank, m.box);
  m.swizzle_mask = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 7 : 3;
  if (box[0] * 2 > (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128u : 64u)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &m, sizeof(m));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrComputeCapabilityMinor ? 0 : 3;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned int, unsigned long long, cudaDriverEntryPointQueryResult *result) {
  *function = reinterpret_cast<void *>(&encode_tiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"

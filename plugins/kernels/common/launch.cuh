// Starting a kernel, and its dynamic shared memory: the two places where kernels meet the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sample_attention {

// The dynamic shared memory of the running thread block, aligned for the widest swizzle.
__device__ __forceinline__ unsigned char *dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

// Launches kernel(params). early: the kernel may become resident before the one in front of it in the stream has finished, and waits for it itself.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream, const Params &params, bool early = false) {
  if (shared_bytes > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  void *arguments[] = {const_cast<Params *>(&params)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), arguments);
}

}  // namespace sample_attention

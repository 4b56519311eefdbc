// The mma.sync kernels by name of (dtype, head size). The definitions are generated from the build's table.
#pragma once

#include "../kernels/decode/decode_params.h"
#include "../kernels/prefill/attend_params.h"
#include "../kernels/sampling/sample_params.h"
#include "../kernels/sampling/sample_sm80_params.h"

#include <cuda_runtime_api.h>

namespace sample_attention {

template <int kDtype, int kHeadDim>
struct LaunchersSm80 {
  static int attend_stage_keys();  // keys of one pipeline stage of the prefill kernel
  static cudaError_t attend(const AttendSm80Params &params, cudaStream_t stream);
  static cudaError_t weigh(const WeightParams &params, cudaStream_t stream);
  static cudaError_t sample_rows(const SampleSm80Params &params, cudaStream_t stream);
  static cudaError_t sample_mass(const SampleSm80Params &params, cudaStream_t stream);
  static cudaError_t sample_blocks(const SampleSm80Params &params, int thread_blocks, cudaStream_t stream);
  static cudaError_t decode(const DecodeParams &params, cudaStream_t stream);
};

}  // namespace sample_attention

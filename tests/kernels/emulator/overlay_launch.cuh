// kernels/common/launch.cuh for the emulator: thread blocks one after the other, shared memory full of NaN at the start of each.
#pragma once

#include "device.h"

namespace sample_attention {

inline unsigned char *dynamic_shared() { return raw; }

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t, const Params &params, bool = false) {
  if (size_t(shared_bytes) > emulator::kSharedBytes) return cudaErrorInvalidValue;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(raw, 0xff, sizeof(raw));
        emulator::run_block(grid, uint3{x, y, z}, threads, [&] { kernel(params); });
      }
    }
  }
  return cudaSuccess;
}

}  // namespace sample_attention

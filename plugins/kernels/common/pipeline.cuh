// Position in a ring of shared-memory stages: the stage, and the parity of the round.
#pragma once

#include <cstdint>

namespace sample_attention {

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace sample_attention

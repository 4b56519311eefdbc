#pragma once

#include "sample_attention/kernels.h"

namespace sample_attention::tensorrt {

// Compute capability of the current device, 90 for 9.0.
Status current_capability(int *capability);

}  // namespace sample_attention::tensorrt

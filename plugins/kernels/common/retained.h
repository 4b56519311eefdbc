// The certificate's raw material.
#pragma once

#include <cstdint>

namespace sample_attention {

// What the sampled rows of one query tile retain of their sample. rows == 0: the tile has no sampled row.
struct Retained {
  float low;  // minimum over the sampled rows
  float sum;  // sum over the sampled rows
  int32_t rows;
};

}  // namespace sample_attention

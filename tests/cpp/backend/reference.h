// SampleAttention in double precision on the host: docs/op.md as plain C++, for every policy. A test holds it against graph_passes/reference.py.
#pragma once

#include "sample_attention/types.h"

#include <cstdint>
#include <vector>

namespace reference {

struct Inputs {
  sa_problem problem;                      // batch, heads, sizes and policy; alpha and alpha_slash of it are not read
  std::vector<double> alpha, alpha_slash;  // [Hq]
  std::vector<double> query, key, value;   // [B, Hq, S, D], [B, Hkv, T, D], [B, Hkv, T, Dv]
  std::vector<uint8_t> key_mask;           // [B, T], or empty
};

struct Outputs {
  std::vector<double> output;       // [B, Hq, S, Dv]
  std::vector<double> certificate;  // [B, Hq, 2]
  std::vector<uint8_t> kept;        // [B, Hq, nQ, nK]: the blocks that each tile reads
};

Outputs sample_attention(const Inputs &inputs);

}  // namespace reference

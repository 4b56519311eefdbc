// From TensorRT's tensor descriptions to the problem of the kernels, with a sentence for everything that does not fit.
#pragma once

#include "parameters.h"
#include "sample_attention/types.h"

#include <string>

namespace sample_attention::tensorrt {

constexpr int kQuery = 0, kKey = 1, kValue = 2, kKeyMask = 3;  // inputs; the last by arity
constexpr int kOutput = 0, kCertificate = 1;                   // outputs; the last when asked for

// Extents of one call. -1: not known yet.
struct Extents {
  int64_t batch = -1, heads = -1, kv_heads = -1, queries = -1, keys = -1, head_dim = -1, value_dim = -1;
};

// Each returns an empty string or one sentence, ended by a full stop.
std::string check_arity(int inputs, int outputs, const Parameters &parameters);
std::string check_types(const nvinfer1::DataType *types, int inputs);
// dims: of each input; entries below 0 are not known yet. Fills what is known.
std::string read_extents(const nvinfer1::Dims *dims, int inputs, Extents *extents);
std::string check_heads(const Extents &extents, const Parameters &parameters);

// The problem of these extents, all of them known.
std::string make_problem(const Extents &extents, nvinfer1::DataType type, bool has_key_mask, const Parameters &parameters, sa_problem *problem);

}  // namespace sample_attention::tensorrt

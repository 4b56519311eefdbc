// What a SampleAttention node asks for, read from plugin fields and written back to them. Knows TensorRT's field structs and nothing else of TensorRT.
#pragma once

#include "NvInferRuntime.h"

#include <cstdint>
#include <string>
#include <vector>

namespace sample_attention::tensorrt {

using Real = float;
using Reals = std::vector<float>;
using Integer = int32_t;
using Text = std::string;

// SA_DENSE .. SA_STRIPE_WINDOW, or -1.
int32_t policy_code(const std::string &policy);

struct Parameters {
#define SA_ATTRIBUTE(type, name, allowed, ok) type name{};
#include "attributes.def"
  // Not an attribute of the ONNX node: 1 gives the layer its second output. Only a caller of the network API can ask for it, because the field is not
  // advertised and the parser passes advertised fields alone.
  Integer certificate = 0;

  // One line with every value, exact: equal text means equal work.
  std::string text() const;
};

// The names and types that the creator advertises.
const std::vector<nvinfer1::PluginField> &advertised_fields();

// Fills `parameters` from fields that the caller may free afterwards. Returns an empty string, or one sentence on the first field that is not allowed.
// `phase` kRUNTIME also holds the version of the library that built the engine against this one.
std::string read_fields(const nvinfer1::PluginFieldCollection *fields, nvinfer1::TensorRTPhase phase, Parameters *parameters);

// All fields of `parameters`, which must outlive them, and the library's version.
std::vector<nvinfer1::PluginField> fields_of(const Parameters &parameters);

}  // namespace sample_attention::tensorrt

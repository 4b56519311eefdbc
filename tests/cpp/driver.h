// A conformance driver for the SampleAttention plugin library: it calls IPluginV3 as TensorRT's builder and runtime do. See README.md.
#pragma once

#include "support/check.h"
#include "support/fields.h"
#include "support/library.h"

#include <memory>
#include <string>
#include <vector>

namespace driver {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;
using Plugin = std::unique_ptr<IPluginV3>;

inline nvinfer1::IPluginV3OneCore *core(IPluginV3 &p) {
  return static_cast<nvinfer1::IPluginV3OneCore *>(p.getCapabilityInterface(PluginCapabilityType::kCORE));
}
inline nvinfer1::IPluginV3OneBuild *build(IPluginV3 &p) {
  return static_cast<nvinfer1::IPluginV3OneBuild *>(p.getCapabilityInterface(PluginCapabilityType::kBUILD));
}
inline nvinfer1::IPluginV3OneRuntime *runtime(IPluginV3 &p) {
  return static_cast<nvinfer1::IPluginV3OneRuntime *>(p.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// A node's attributes. The numbers differ from each other, so that a mixed up field shows.
struct Node {
  float scale = 0.35f, softcap = 0;
  int32_t is_causal = 1;
  std::string policy = "tile";
  std::vector<float> alpha{0.6f}, alpha_slash{0.7f};
  float max_density = 1;
  int32_t stride = 8, sample_rows = 4, value_weight = 1, segment = 48;
  float sample_ratio = 0.2f, window_ratio = 0.11f;
  int32_t block_q = 32, block_k = 16, window = 9, sink = 40, dense_rows = 7, min_length = 17;
  int32_t certificate = 0;

  void fill(Fields *fields) const;
};

// A plugin as the parser makes it, and as an engine makes it from serialised fields. Null when refused.
Plugin create(Library &library, const Node &node, const char *name = "layer0");
Plugin recreate(Library &library, const nvinfer1::PluginFieldCollection &serialised);

// Shapes and types of one call: query, key, value and, with a mask, key_mask; output and, when asked for, certificate.
struct Shape {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  bool mask;
};
struct Descs {
  std::vector<PluginTensorDesc> inputs, outputs;
};
Descs describe(const Shape &shape, DataType type, bool certificate);
std::vector<DynamicPluginTensorDesc> profile(const std::vector<PluginTensorDesc> &opt, const std::vector<PluginTensorDesc> &max);
size_t workspace_of(IPluginV3 &plugin, const Shape &most, DataType type, bool certificate);

void check_life_cycle(Library &library);
void check_calls(Library &library, bool quick);

}  // namespace driver

// SampleAttention as a TensorRT layer: IPluginV3 with the V3ONE core, build and runtime capabilities.
//
// One object serves one clone, context and optimisation profile; nothing is shared between clones. No GPU call is made before attachToContext. enqueue launches
// on the given stream and does nothing else: no synchronisation, no allocation, so that it can be captured in a CUDA graph.
#pragma once

#include "call.h"
#include "parameters.h"

namespace sample_attention::tensorrt {

constexpr const char *kPluginName = "SampleAttention";
constexpr const char *kPluginVersion = "1";
constexpr const char *kPluginNamespace = "";

class Plugin final : public nvinfer1::IPluginV3, public nvinfer1::IPluginV3OneCore, public nvinfer1::IPluginV3OneBuildV2, public nvinfer1::IPluginV3OneRuntime {
 public:
  // name: of the layer, for its messages.
  Plugin(std::string name, Parameters parameters);
  Plugin(const Plugin &other);
  Plugin &operator=(const Plugin &) = delete;

  nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3 *clone() noexcept override;

  const char *getPluginName() const noexcept override { return kPluginName; }
  const char *getPluginVersion() const noexcept override { return kPluginVersion; }
  const char *getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1 + parameters_.certificate; }
  int32_t getOutputDataTypes(nvinfer1::DataType *outputs, int32_t output_count, const nvinfer1::DataType *inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t input_count, const nvinfer1::DimsExprs *shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs *outputs, int32_t output_count, nvinfer1::IExprBuilder &builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc *tensors, int32_t input_count,
                                 int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t input_count, const nvinfer1::DynamicPluginTensorDesc *outputs,
                          int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t input_count, const nvinfer1::DynamicPluginTensorDesc *outputs,
                          int32_t output_count) const noexcept override;
  const char *getTimingCacheID() noexcept override { return text_.c_str(); }
  const char *getMetadataString() noexcept override { return text_.c_str(); }

  nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *context) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc *inputs, int32_t input_count, const nvinfer1::PluginTensorDesc *outputs,
                        int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc *input_descs, const nvinfer1::PluginTensorDesc *output_descs, const void *const *inputs,
                  void *const *outputs, void *workspace, cudaStream_t stream) noexcept override;
  const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override;

 private:
  int32_t refuse(const std::string &why) const noexcept;
  std::string check_profile(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t input_count, int32_t output_count) const;
  std::string check_call(const nvinfer1::PluginTensorDesc *inputs, int32_t input_count, int32_t output_count);

  const std::string name_;
  const Parameters parameters_;
  const std::string text_;
  std::vector<nvinfer1::PluginField> fields_;  // they point into parameters_
  nvinfer1::PluginFieldCollection collection_{};

  // Of the context.
  int input_count_ = 0;
  int capability_ = 0;
  bool path_told_ = false;
};

}  // namespace sample_attention::tensorrt

#include "plugin.h"

#include "device.h"
#include "host.h"
#include "sample_attention/kernels.h"

#include <exception>
#include <new>
#include <utility>

namespace sample_attention::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::ILogger;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int32_t kOk = 0, kRefused = 1;

std::string check_formats(const PluginTensorDesc *inputs, int inputs_count) {
  for (int i = 0; i < inputs_count; ++i)
    if (inputs[i].format != TensorFormat::kLINEAR) return "Input " + std::to_string(i) + " is not in the linear format, the only one that is supported.";
  return {};
}

sa_tensor contiguous(const void *data, int64_t heads, int64_t rows, int64_t size) { return {const_cast<void *>(data), heads * rows * size, rows * size, size}; }

// A call without an output element; the certificate has some whenever there is a batch.
bool is_empty(const sa_problem &p) { return p.batch == 0 || (p.queries == 0 && p.has_certificate == 0); }

}  // namespace

Plugin::Plugin(std::string name, Parameters parameters)
    : name_(std::move(name)), parameters_(std::move(parameters)), text_(parameters_.text()), fields_(fields_of(parameters_)) {}

Plugin::Plugin(const Plugin &other) : Plugin(other.name_, other.parameters_) {
  input_count_ = other.input_count_;
  capability_ = other.capability_;
}

int32_t Plugin::refuse(const std::string &why) const noexcept {
  try {
    log(ILogger::Severity::kERROR, "SampleAttention layer '" + name_ + "': " + why);
  } catch (...) {
  }
  return kRefused;
}

nvinfer1::IPluginCapability *Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  // The caller casts the result to exactly these bases.
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore *>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild *>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3 *Plugin::clone() noexcept try { return new Plugin(*this); } catch (const std::exception &error) {
  refuse(error.what());
  return nullptr;
}

int32_t Plugin::getOutputDataTypes(DataType *outputs, int32_t output_count, const DataType *inputs, int32_t input_count) const noexcept try {
  std::string why = check_arity(input_count, output_count, parameters_);
  if (why.empty()) why = check_types(inputs, input_count);
  if (!why.empty()) return refuse(why);
  outputs[kOutput] = inputs[kQuery];
  if (output_count > kCertificate) outputs[kCertificate] = DataType::kFLOAT;
  return kOk;
} catch (const std::exception &error) {
  return refuse(error.what());
}

int32_t Plugin::getOutputShapes(const DimsExprs *inputs, int32_t input_count, const DimsExprs *, int32_t shape_input_count, DimsExprs *outputs,
                                int32_t output_count, nvinfer1::IExprBuilder &builder) noexcept try {
  std::string why = check_arity(input_count, output_count, parameters_);
  if (why.empty() && shape_input_count != 0) why = "The layer has shape inputs; it takes none.";
  if (!why.empty()) return refuse(why);
  Dims dims[kKeyMask + 1]{};
  for (int32_t i = 0; i < input_count; ++i) {
    dims[i].nbDims = inputs[i].nbDims;
    for (int32_t axis = 0; axis < inputs[i].nbDims && axis < Dims::MAX_DIMS; ++axis)
      dims[i].d[axis] = inputs[i].d[axis]->isConstant() ? inputs[i].d[axis]->getConstantValue() : -1;
  }
  Extents extents;
  why = read_extents(dims, input_count, &extents);
  if (why.empty()) why = check_heads(extents, parameters_);
  if (!why.empty()) return refuse(why);
  outputs[kOutput] = inputs[kQuery];
  outputs[kOutput].d[3] = inputs[kValue].d[3];
  if (output_count > kCertificate) {
    outputs[kCertificate].nbDims = 3;
    outputs[kCertificate].d[0] = inputs[kQuery].d[0];
    outputs[kCertificate].d[1] = inputs[kQuery].d[1];
    outputs[kCertificate].d[2] = builder.constant(2);
  }
  return kOk;
} catch (const std::exception &error) {
  return refuse(error.what());
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc *tensors, int32_t input_count, int32_t output_count) noexcept {
  if (position < 0 || position >= input_count + output_count) return false;
  const PluginTensorDesc &tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return false;
  if (position == kQuery) return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16 || tensor.type == DataType::kFLOAT;
  if (position == kKeyMask && input_count > kKeyMask) return tensor.type == DataType::kBOOL;
  if (position == input_count + kCertificate) return tensor.type == DataType::kFLOAT;
  return tensor.type == tensors[kQuery].desc.type;
}

// What the largest shapes of a profile show. The extents of a profile are bounds, so that only those can be compared which every shape shares.
std::string Plugin::check_profile(const DynamicPluginTensorDesc *inputs, int32_t input_count, int32_t output_count) const {
  std::string why = check_arity(input_count, output_count, parameters_);
  DataType types[kKeyMask + 1];
  Dims dims[kKeyMask + 1], largest[kKeyMask + 1];
  for (int32_t i = 0; why.empty() && i < input_count; ++i) {
    types[i] = inputs[i].desc.type;
    dims[i] = inputs[i].desc.dims;
    largest[i] = inputs[i].max;
    if (inputs[i].desc.format != TensorFormat::kLINEAR) why = "Input " + std::to_string(i) + " is not in the linear format, the only one that is supported.";
  }
  Extents extents, most;
  if (why.empty()) why = check_types(types, input_count);
  if (why.empty()) why = read_extents(dims, input_count, &extents);
  if (why.empty()) why = check_heads(extents, parameters_);
  if (!why.empty()) return why;
  for (int32_t i = 0; i < input_count; ++i)
    for (int32_t axis = 0; axis < largest[i].nbDims; ++axis)
      if (largest[i].d[axis] < 0) return {};  // no profile yet
  why = read_extents(largest, input_count, &most);
  if (why.empty()) why = check_heads(most, parameters_);
  if (!why.empty()) return "At the profile's largest shapes: " + why;
  sa_problem problem;
  why = make_problem(most, types[kQuery], input_count > kKeyMask, parameters_, &problem);
  if (why.empty() && !is_empty(problem)) {
    const sa_support support = supports(problem, 0);
    if (support.code != SA_OK) why = support.text;
  }
  return why;
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t input_count, const DynamicPluginTensorDesc *, int32_t output_count) noexcept
    try {
  const std::string why = check_profile(inputs, input_count, output_count);
  if (!why.empty()) return refuse(why);
  input_count_ = input_count;
  return kOk;
} catch (const std::exception &error) {
  return refuse(error.what());
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t input_count, const DynamicPluginTensorDesc *, int32_t) const noexcept try {
  Dims largest[kKeyMask + 1];
  for (int32_t i = 0; i < input_count && i <= kKeyMask; ++i) largest[i] = inputs[i].max;
  Extents most;
  sa_problem problem;
  if (input_count > kKeyMask + 1 || !read_extents(largest, input_count, &most).empty() ||
      !make_problem(most, inputs[kQuery].desc.type, input_count > kKeyMask, parameters_, &problem).empty())
    return 0;  // configurePlugin has said why
  return static_cast<size_t>(workspace_bytes(problem));
} catch (...) {
  return 0;
}

nvinfer1::IPluginV3 *Plugin::attachToContext(nvinfer1::IPluginResourceContext *) noexcept try {
  auto *attached = new Plugin(*this);
  attached->path_told_ = false;
  attached->capability_ = 0;
  return attached;
} catch (const std::exception &error) {
  refuse(error.what());
  return nullptr;
}

std::string Plugin::check_call(const PluginTensorDesc *inputs, int32_t input_count, int32_t output_count) {
  std::string why = check_arity(input_count, output_count, parameters_);
  if (why.empty()) why = check_formats(inputs, input_count);
  if (!why.empty()) return why;
  DataType types[kKeyMask + 1];
  Dims dims[kKeyMask + 1];
  for (int32_t i = 0; i < input_count; ++i) {
    types[i] = inputs[i].type;
    dims[i] = inputs[i].dims;
  }
  Extents extents;
  sa_problem problem;
  why = check_types(types, input_count);
  if (why.empty()) why = read_extents(dims, input_count, &extents);
  if (why.empty()) why = check_heads(extents, parameters_);
  if (why.empty()) why = make_problem(extents, types[kQuery], input_count > kKeyMask, parameters_, &problem);
  if (!why.empty() || is_empty(problem)) return why;
  if (capability_ == 0) {
    const Status status = current_capability(&capability_);
    if (!status.ok()) return status.text;
  }
  const sa_support support = supports(problem, capability_);
  if (support.code != SA_OK) return support.text;
  if (!path_told_) {
    path_told_ = true;
    std::string line = "SampleAttention layer '" + name_ + "': compute capability " + std::to_string(capability_ / 10) + "." +
                       std::to_string(capability_ % 10) + ", policy " + parameters_.policy + ", attention by " + path_name(support.path) + " kernels";
    if (support.select_path != SA_PATH_NONE) line += std::string(", selection by ") + path_name(support.select_path) + " kernels";
    log(ILogger::Severity::kINFO, line + (support.text[0] == '\0' ? "." : std::string(": ") + support.text));
  }
  return {};
}

int32_t Plugin::onShapeChange(const PluginTensorDesc *inputs, int32_t input_count, const PluginTensorDesc *, int32_t output_count) noexcept try {
  const std::string why = check_call(inputs, input_count, output_count);
  if (!why.empty()) return refuse(why);
  input_count_ = input_count;
  return kOk;
} catch (const std::exception &error) {
  return refuse(error.what());
}

int32_t Plugin::enqueue(const PluginTensorDesc *input_descs, const PluginTensorDesc *, const void *const *inputs, void *const *outputs, void *workspace,
                        cudaStream_t stream) noexcept {
  // onShapeChange has checked these shapes; what follows neither allocates nor throws until something is refused.
  const Dims &query = input_descs[kQuery].dims, &key = input_descs[kKey].dims, &value = input_descs[kValue].dims;
  const Extents extents{query.d[0], query.d[1], key.d[1], query.d[2], key.d[2], query.d[3], value.d[3]};
  const bool masked = input_count_ > kKeyMask;
  sa_prefill_params call{};
  const std::string why = make_problem(extents, input_descs[kQuery].type, masked, parameters_, &call.problem);
  if (!why.empty()) return refuse(why);
  if (is_empty(call.problem)) return kOk;
  call.query = contiguous(inputs[kQuery], extents.heads, extents.queries, extents.head_dim);
  call.key = contiguous(inputs[kKey], extents.kv_heads, extents.keys, extents.head_dim);
  call.value = contiguous(inputs[kValue], extents.kv_heads, extents.keys, extents.value_dim);
  call.output = contiguous(outputs[kOutput], extents.heads, extents.queries, extents.value_dim);
  if (masked) call.key_mask = static_cast<const uint8_t *>(inputs[kKeyMask]);
  if (parameters_.certificate != 0) call.certificate = static_cast<float *>(outputs[kCertificate]);
  if (parameters_.alpha.size() > 1) call.host_alpha = parameters_.alpha.data();
  if (parameters_.alpha_slash.size() > 1) call.host_alpha_slash = parameters_.alpha_slash.data();
  const Status status = run(call, workspace, workspace_bytes(call.problem), stream);
  return status.ok() ? kOk : refuse(status.text);
}

const nvinfer1::PluginFieldCollection *Plugin::getFieldsToSerialize() noexcept {
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

}  // namespace sample_attention::tensorrt

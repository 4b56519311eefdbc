// A C door to one plugin object for Python (tests/tensorrt/plugin_shim.py): the interfaces of TensorRT that its Python bindings only pretend to call.
// Pointers are host pointers with the reference backend and device pointers with the real library.
#include "support/fields.h"
#include "support/library.h"

#include <cstdio>
#include <cstring>
#include <memory>

namespace {

using driver::Library;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

struct Layer {
  std::unique_ptr<IPluginV3> built, attached;
  std::vector<PluginTensorDesc> inputs, outputs;
};

nvinfer1::IPluginV3OneBuild *build(IPluginV3 &p) { return static_cast<nvinfer1::IPluginV3OneBuild *>(p.getCapabilityInterface(PluginCapabilityType::kBUILD)); }
nvinfer1::IPluginV3OneRuntime *runtime(IPluginV3 &p) {
  return static_cast<nvinfer1::IPluginV3OneRuntime *>(p.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

std::vector<PluginTensorDesc> descs(int32_t count, const int32_t *types, const int32_t *ranks, const int64_t *dims) {
  std::vector<PluginTensorDesc> out(count);
  for (int32_t i = 0; i < count; ++i) {
    out[i] = PluginTensorDesc{{}, static_cast<DataType>(types[i]), TensorFormat::kLINEAR, 1.0f};
    out[i].dims.nbDims = ranks[i];
    for (int32_t axis = 0; axis < ranks[i]; ++axis) out[i].dims.d[axis] = *dims++;
  }
  return out;
}

DynamicPluginTensorDesc fixed(const PluginTensorDesc &d) {
  DynamicPluginTensorDesc out{};
  out.desc = d;
  out.min = out.opt = out.max = d.dims;
  return out;
}

}  // namespace

#define SHIM extern "C" __attribute__((visibility("default")))

SHIM Library *shim_open(const char *plugin, char *message, size_t size) {
  auto library = std::make_unique<Library>(plugin, "");
  std::snprintf(message, size, "%s", library->error().c_str());
  return library->creator() == nullptr ? nullptr : library.release();
}

// The advertised fields as lines "name type length".
SHIM void shim_fields(Library *library, char *text, size_t size) {
  const auto *names = library->creator()->getFieldNames();
  std::string out;
  for (int32_t i = 0; i < names->nbFields; ++i) {
    const auto &f = names->fields[i];
    out += std::string(f.name) + " " + std::to_string(static_cast<int>(f.type)) + " " + std::to_string(f.length) + "\n";
  }
  std::snprintf(text, size, "%s", out.c_str());
}

SHIM void shim_identity(Library *library, char *text, size_t size) {
  const auto *c = library->creator();
  std::snprintf(text, size, "%s|%s|%s", c->getPluginName(), c->getPluginVersion(), c->getPluginNamespace());
}

SHIM Layer *shim_create(Library *library, const char *name, int32_t count, const char *const *names, const int32_t *types, const int32_t *lengths,
                        const void *const *data, int32_t phase, char *message, size_t size) {
  library->last_error();
  std::vector<nvinfer1::PluginField> fields;
  for (int32_t i = 0; i < count; ++i) fields.emplace_back(names[i], data[i], static_cast<nvinfer1::PluginFieldType>(types[i]), lengths[i]);
  const nvinfer1::PluginFieldCollection collection{count, fields.data()};
  std::unique_ptr<IPluginV3> plugin(library->creator()->createPlugin(name, &collection, static_cast<nvinfer1::TensorRTPhase>(phase)));
  std::snprintf(message, size, "%s", library->last_error().c_str());
  if (plugin == nullptr) return nullptr;
  return new Layer{std::move(plugin), nullptr, {}, {}};
}

SHIM void shim_destroy(Layer *layer) { delete layer; }

SHIM void shim_timing_cache_id(Layer *layer, char *text, size_t size) { std::snprintf(text, size, "%s", build(*layer->built)->getTimingCacheID()); }

// getOutputDataTypes, configurePlugin and getWorkspaceSize for fixed shapes, then a fresh context and its onShapeChange: the bytes of workspace, or -1 with a
// message. Shapes of outputs are given too, as TensorRT gives them. The information lines of the context follow the message after a newline.
SHIM int64_t shim_shape(Library *library, Layer *layer, int32_t inputs, const int32_t *types, const int32_t *ranks, const int64_t *dims, int32_t outputs,
                        const int32_t *out_types, const int32_t *out_ranks, const int64_t *out_dims, char *message, size_t size) {
  library->last_error();
  layer->inputs = descs(inputs, types, ranks, dims);
  layer->outputs = descs(outputs, out_types, out_ranks, out_dims);
  std::vector<DynamicPluginTensorDesc> in, out;
  std::vector<DataType> in_types, declared(outputs);
  for (const auto &d : layer->inputs) {
    in.push_back(fixed(d));
    in_types.push_back(d.type);
  }
  for (const auto &d : layer->outputs) out.push_back(fixed(d));
  auto *b = build(*layer->built);
  const bool built =
      b->getOutputDataTypes(declared.data(), outputs, in_types.data(), inputs) == 0 && b->configurePlugin(in.data(), inputs, out.data(), outputs) == 0;
  int64_t bytes = -1;
  if (built) {
    bytes = static_cast<int64_t>(b->getWorkspaceSize(in.data(), inputs, out.data(), outputs));
    layer->attached.reset(runtime(*layer->built)->attachToContext(nullptr));
    if (layer->attached == nullptr || runtime(*layer->attached)->onShapeChange(layer->inputs.data(), inputs, layer->outputs.data(), outputs) != 0) bytes = -1;
  }
  std::string errors, lines;
  for (const auto &line : library->recorder().take()) (line.severity <= nvinfer1::ILogger::Severity::kERROR ? errors : lines) += line.text + "\n";
  std::snprintf(message, size, "%s", (bytes < 0 ? errors : lines).c_str());
  return bytes;
}

SHIM int32_t shim_enqueue(Library *library, Layer *layer, const void *const *inputs, void *const *outputs, void *workspace, void *stream, char *message,
                          size_t size) {
  const int32_t code =
      runtime(*layer->attached)->enqueue(layer->inputs.data(), layer->outputs.data(), inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
  if (code != 0) std::snprintf(message, size, "%s", library->last_error().c_str());
  return code;
}

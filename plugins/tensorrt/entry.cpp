// The library's two exported functions, and its registration when it is only dlopened.
#include "host.h"
#include "parameters.h"
#include "plugin.h"

#include <exception>

namespace sample_attention::tensorrt {
namespace {

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3 *createPlugin(const char *name, const nvinfer1::PluginFieldCollection *fields, nvinfer1::TensorRTPhase phase) noexcept override {
    const char *layer = name == nullptr ? "" : name;
    try {
      Parameters parameters;
      const std::string why = read_fields(fields, phase, &parameters);
      if (why.empty()) return new Plugin(layer, std::move(parameters));
      log(nvinfer1::ILogger::Severity::kERROR, "SampleAttention layer '" + std::string(layer) + "': " + why);
    } catch (const std::exception &error) {
      log(nvinfer1::ILogger::Severity::kERROR, error.what());
    }
    return nullptr;
  }
  const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override {
    static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(advertised_fields().size()), advertised_fields().data()};
    return &collection;
  }
  const char *getPluginName() const noexcept override { return kPluginName; }
  const char *getPluginVersion() const noexcept override { return kPluginVersion; }
  const char *getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

// Never destroyed: a registry may outlive this library's statics.
Creator &creator() {
  static Creator &c = *new Creator;
  return c;
}

__attribute__((constructor)) void on_load() { register_creator(creator()); }

}  // namespace
}  // namespace sample_attention::tensorrt

#define SA_EXPORT extern "C" __attribute__((visibility("default")))

// TensorRT's IPluginRegistry::loadLibrary calls these, the finder's first.
SA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *finder) { sample_attention::tensorrt::set_logger_finder(finder); }

SA_EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
  using namespace sample_attention::tensorrt;
  hand_over(creator());
  static nvinfer1::IPluginCreatorInterface *const list[] = {&creator()};
  count = 1;
  return list;
}

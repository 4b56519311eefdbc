#include "library.h"

#include <cstring>

// The plugin asks the maker of a logger finder for its version, and these headers made ours.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept {
  return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}

namespace driver {
namespace {

template <class Function>
Function symbol(void *module, const char *name) {
  return reinterpret_cast<Function>(dlsym(module, name));
}

}  // namespace

Library::Library(const std::string &plugin, const std::string &tensorrt) {
  nvinfer1::IPluginCreatorInterface *found = nullptr;
  if (!tensorrt.empty()) {
    void *module = dlopen(tensorrt.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (module == nullptr) {
      error_ = dlerror();
      return;
    }
    const int32_t version = symbol<int32_t (*)()>(module, "getInferLibVersion")();
    // The registry's virtual table differs between majors; RTX 1.x has that of 11.
    if ((version < 100000 ? 11 : version / 10000) != (NV_TENSORRT_MAJOR >= 11 ? 11 : NV_TENSORRT_MAJOR)) {
      error_ = tensorrt + " has version " + std::to_string(version) + ", this driver was compiled for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + ".";
      return;
    }
    registry_ = symbol<nvinfer1::IPluginRegistry *(*)()>(module, "getPluginRegistry")();
    handle_ = registry_->loadLibrary(plugin.c_str());
    if (handle_ == nullptr) {
      error_ = "the registry of " + tensorrt + " did not load " + plugin;
      return;
    }
    found = registry_->getCreator("SampleAttention", "1", "");
  }
  void *module = dlopen(plugin.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    error_ = dlerror();
    return;
  }
  // After loadLibrary this replaces TensorRT's finder: the lines come here.
  symbol<void (*)(nvinfer1::ILoggerFinder *)>(module, "setLoggerFinder")(&recorder_);
  if (tensorrt.empty()) {
    int32_t count = 0;
    auto *const *creators = symbol<nvinfer1::IPluginCreatorInterface *const *(*)(int32_t &)>(module, "getCreators")(count);
    if (count == 1) found = creators[0];
  }
  if (found == nullptr || std::strcmp(found->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) {
    error_ = "there is no V3 creator of SampleAttention";
    return;
  }
  creator_ = static_cast<nvinfer1::IPluginCreatorV3One *>(found);
}

std::string Library::last_error() {
  std::string out;
  for (const auto &line : recorder_.take())
    if (line.severity <= nvinfer1::ILogger::Severity::kERROR) out = line.text;
  return out;
}

void Library::unload() {
  if (registry_ != nullptr && handle_ != nullptr) registry_->deregisterLibrary(handle_);
  handle_ = nullptr;
}

}  // namespace driver

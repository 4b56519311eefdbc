// The plugin library, opened as TensorRT opens it, and what it says to TensorRT's logger.
#pragma once

#include "NvInferRuntime.h"

#include <dlfcn.h>

#include <mutex>
#include <string>
#include <vector>

namespace driver {

class Recorder final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  struct Line {
    nvinfer1::ILogger::Severity severity;
    std::string text;
  };
  void log(Severity severity, const char *text) noexcept override {
    std::lock_guard<std::mutex> lock(mutex_);
    lines_.push_back({severity, text});
  }
  nvinfer1::ILogger *findLogger() override { return this; }
  std::vector<Line> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Line> out;
    out.swap(lines_);
    return out;
  }

 private:
  std::mutex mutex_;
  std::vector<Line> lines_;
};

class Library {
 public:
  // tensorrt: path of a TensorRT library whose registry loads the plugin, or empty: dlopen alone. Without success error() says why.
  Library(const std::string &plugin, const std::string &tensorrt);
  ~Library() { unload(); }
  Library(const Library &) = delete;
  Library &operator=(const Library &) = delete;

  const std::string &error() const { return error_; }
  nvinfer1::IPluginCreatorV3One *creator() const { return creator_; }
  nvinfer1::IPluginRegistry *registry() const { return registry_; }
  Recorder &recorder() { return recorder_; }
  // The sentence of the last error, empty without one; forgets all lines.
  std::string last_error();
  void unload();

 private:
  std::string error_;
  nvinfer1::IPluginCreatorV3One *creator_ = nullptr;
  nvinfer1::IPluginRegistry *registry_ = nullptr;
  nvinfer1::IPluginRegistry::PluginLibraryHandle handle_ = nullptr;
  // Never freed: the plugin keeps the finder as it would TensorRT's own.
  Recorder &recorder_ = *new Recorder;
};

}  // namespace driver

// Plugin fields that own their memory, as a plan or a parser does: copied in, and spoiled before they are freed.
#pragma once

#include "NvInferRuntime.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

namespace driver {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

inline size_t bytes_of(const PluginField &f) {
  switch (f.type) {
    case PluginFieldType::kFLOAT64:
    case PluginFieldType::kINT64:
      return size_t(8) * f.length;
    case PluginFieldType::kFLOAT32:
    case PluginFieldType::kINT32:
      return size_t(4) * f.length;
    case PluginFieldType::kFLOAT16:
    case PluginFieldType::kBF16:
    case PluginFieldType::kINT16:
      return size_t(2) * f.length;
    case PluginFieldType::kDIMS:
      return sizeof(nvinfer1::Dims) * f.length;
    default:
      return f.length;
  }
}

class Fields {
 public:
  Fields() = default;
  explicit Fields(const PluginFieldCollection &source) {
    for (int32_t i = 0; i < source.nbFields; ++i) {
      const PluginField &f = source.fields[i];
      add(f.name, f.data, f.type, f.length, bytes_of(f));
    }
  }
  // A lone message: the object frees its memory spoiled, so that a plugin that kept a pointer reads rubbish even where no sanitizer watches.
  ~Fields() {
    for (auto &blob : blobs_) std::fill(blob.begin(), blob.end(), char(0xdb));
    for (auto &name : names_) std::fill(name.begin(), name.end(), '#');
  }
  Fields(const Fields &) = delete;
  Fields &operator=(const Fields &) = delete;

  void add(const char *name, const void *data, PluginFieldType type, int32_t length, size_t bytes) {
    names_.emplace_back(name);
    // One byte too many in front: the data of a plan need not be aligned.
    blobs_.emplace_back(1 + bytes);
    if (bytes > 0) std::memcpy(blobs_.back().data() + 1, data, bytes);
    fields_.emplace_back(names_.back().c_str(), blobs_.back().data() + 1, type, length);
  }
  void add(const char *name, int32_t v) { add(name, &v, PluginFieldType::kINT32, 1, 4); }
  void add(const char *name, float v) { add(name, &v, PluginFieldType::kFLOAT32, 1, 4); }
  void add(const char *name, const std::vector<float> &v) { add(name, v.data(), PluginFieldType::kFLOAT32, static_cast<int32_t>(v.size()), 4 * v.size()); }
  void add(const char *name, const std::string &v) { add(name, v.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(v.size()) + 1, v.size() + 1); }

  PluginField *find(const char *name) {
    for (auto &f : fields_)
      if (std::strcmp(f.name, name) == 0) return &f;
    return nullptr;
  }
  void *data(const char *name) { return const_cast<void *>(find(name)->data); }
  void remove(const char *name) {
    fields_.erase(std::remove_if(fields_.begin(), fields_.end(), [&](const PluginField &f) { return std::strcmp(f.name, name) == 0; }), fields_.end());
  }
  const PluginFieldCollection *collection() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  std::deque<std::string> names_;
  std::deque<std::vector<char>> blobs_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

inline bool same(const PluginFieldCollection &a, const PluginFieldCollection &b) {
  if (a.nbFields != b.nbFields) return false;
  for (int32_t i = 0; i < a.nbFields; ++i) {
    const PluginField &x = a.fields[i], &y = b.fields[i];
    if (std::strcmp(x.name, y.name) != 0 || x.type != y.type || x.length != y.length || std::memcmp(x.data, y.data, bytes_of(x)) != 0) return false;
  }
  return true;
}

}  // namespace driver

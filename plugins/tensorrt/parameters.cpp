#include "parameters.h"

#include "sample_attention/types.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace sample_attention::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr const char *kVersionField = "library_version";
constexpr const char *kVersion = SA_VERSION;

bool is_block_size(int64_t v) { return v == 16 || v == 32 || v == 64 || v == 128 || v == 256; }

std::string number(double v) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", v);
  return text;
}

std::string type_name(PluginFieldType type) {
  static const char *const kNames[] = {"FLOAT16", "FLOAT32", "FLOAT64", "INT8",  "INT16", "INT32", "CHAR",
                                       "DIMS",    "UNKNOWN", "BF16",    "INT64", "FP8",   "INT4",  "FP4"};
  const auto code = static_cast<uint32_t>(type);
  return code < sizeof(kNames) / sizeof(*kNames) ? kNames[code] : "type " + std::to_string(code);
}

// At most 40 characters of what was given, none of them able to break a log line.
std::string quoted(const char *data, size_t size) {
  std::string out = "'";
  for (size_t i = 0; i < size && i < 40; ++i) out += data[i] >= 32 && data[i] < 127 ? data[i] : '?';
  return out + (size > 40 ? "...'" : "'");
}

std::string wrong_type(const PluginField &field, const char *wanted, const char *allowed) {
  return std::string(field.name) + " has " + std::to_string(field.length) + " values of type " + type_name(field.type) +
         (field.data == nullptr ? " and no data" : "") + "; allowed is " + wanted + ": " + allowed + ".";
}

std::string not_allowed(const char *name, const std::string &got, const char *allowed) {
  return std::string(name) + " is " + got + "; allowed is " + allowed + ".";
}

bool has_data(const PluginField &field) { return field.data != nullptr && field.length >= 1; }

// Each read() returns a sentence or nothing. Callers' data need not be aligned.
std::string read(const PluginField &field, const char *allowed, Reals *out) {
  // Nobody has a million heads: a larger length is a field that was not filled.
  const bool doubles = field.type == PluginFieldType::kFLOAT64;
  if (!has_data(field) || field.length > (1 << 20) || (field.type != PluginFieldType::kFLOAT32 && !doubles)) return wrong_type(field, "FLOAT32", allowed);
  out->resize(field.length);
  for (int32_t i = 0; i < field.length; ++i) {
    double value = 0;
    if (doubles) {
      std::memcpy(&value, static_cast<const char *>(field.data) + size_t(i) * sizeof(double), sizeof(double));
    } else {
      float single = 0;
      std::memcpy(&single, static_cast<const char *>(field.data) + size_t(i) * sizeof(float), sizeof(float));
      value = single;
    }
    if (!(std::fabs(value) <= std::numeric_limits<float>::max())) return not_allowed(field.name, number(value), allowed);
    (*out)[i] = static_cast<float>(value);
  }
  return {};
}

std::string read(const PluginField &field, const char *allowed, Real *out) {
  Reals values;
  if (field.length != 1) return wrong_type(field, "one FLOAT32", allowed);
  std::string error = read(field, allowed, &values);
  if (error.empty()) *out = values[0];
  return error;
}

std::string read(const PluginField &field, const char *allowed, Integer *out) {
  const bool wide = field.type == PluginFieldType::kINT64;
  if (!has_data(field) || field.length != 1 || (field.type != PluginFieldType::kINT32 && !wide)) return wrong_type(field, "one INT32", allowed);
  int64_t value = 0;
  if (wide) {
    std::memcpy(&value, field.data, sizeof(value));
  } else {
    int32_t narrow = 0;
    std::memcpy(&narrow, field.data, sizeof(narrow));
    value = narrow;
  }
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
    return not_allowed(field.name, std::to_string(value), (std::string(allowed) + ", within 32 bits").c_str());
  *out = static_cast<int32_t>(value);
  return {};
}

// The parser counts the terminator, other callers may not.
std::string read(const PluginField &field, const char *allowed, Text *out) {
  if (field.data == nullptr || field.length < 0 || field.type != PluginFieldType::kCHAR) return wrong_type(field, "CHAR", allowed);
  const char *data = static_cast<const char *>(field.data);
  size_t size = field.length;
  while (size > 0 && data[size - 1] == '\0') --size;
  if (size > 256 || std::memchr(data, '\0', size) != nullptr) return not_allowed(field.name, quoted(data, size), allowed);
  out->assign(data, size);
  return {};
}

std::string render(Real v) { return number(v); }
std::string render(Integer v) { return std::to_string(v); }
std::string render(const Text &v) { return quoted(v.data(), v.size()); }
std::string render(const Reals &values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) out += (i == 0 ? "" : ", ") + number(values[i]);
  return out + "]";
}

template <class T, class Test>
std::string check(const char *name, const char *allowed, const T &value, Test test) {
  return test(value) ? std::string() : not_allowed(name, render(value), allowed);
}

template <class Test>
std::string check(const char *name, const char *allowed, const Reals &values, Test test) {
  for (float v : values)
    if (!test(v)) return not_allowed(name, number(v), allowed);
  return {};
}

// Constraints between attributes bind only the policy that reads them; the others carry their defaults.
std::string check_together(const Parameters &p) {
  const auto refuse = [](const char *name, auto got, const std::string &with) {
    const char *allowed = "";
#define SA_ATTRIBUTE(type, attribute, sentence, ok) \
  if (std::strcmp(name, #attribute) == 0) allowed = sentence;
#include "attributes.def"
    return not_allowed(name, render(got) + " with " + with, allowed);
  };
  const auto text = [](int32_t v) { return std::to_string(v); };
  if (p.policy == "residue" && (p.block_q % p.stride != 0 || p.block_k % p.stride != 0))
    return refuse("stride", p.stride, "block_q " + text(p.block_q) + " and block_k " + text(p.block_k));
  if (p.policy == "tile" && p.block_q % p.sample_rows != 0) return refuse("sample_rows", p.sample_rows, "block_q " + text(p.block_q));
  if (p.policy == "column_slash" && p.sample_rows > p.segment) return refuse("sample_rows", p.sample_rows, "segment " + text(p.segment));
  if ((p.policy == "column_slash" || p.policy == "stripe_window") && p.max_density < 1) return refuse("max_density", p.max_density, "policy " + p.policy);
  if (p.alpha.size() > 1 && p.alpha_slash.size() > 1 && p.alpha.size() != p.alpha_slash.size())
    return "alpha has " + std::to_string(p.alpha.size()) + " values and alpha_slash has " + std::to_string(p.alpha_slash.size()) +
           "; allowed is one value, or one a query head, in each.";
  return {};
}

PluginField advertise(const char *name, const Real *) { return {name, nullptr, PluginFieldType::kFLOAT32, 1}; }
PluginField advertise(const char *name, const Reals *) { return {name, nullptr, PluginFieldType::kFLOAT32, 1}; }
PluginField advertise(const char *name, const Integer *) { return {name, nullptr, PluginFieldType::kINT32, 1}; }
PluginField advertise(const char *name, const Text *) { return {name, nullptr, PluginFieldType::kCHAR, 1}; }

PluginField field_of(const char *name, const Real &v) { return {name, &v, PluginFieldType::kFLOAT32, 1}; }
PluginField field_of(const char *name, const Reals &v) { return {name, v.data(), PluginFieldType::kFLOAT32, static_cast<int32_t>(v.size())}; }
PluginField field_of(const char *name, const Integer &v) { return {name, &v, PluginFieldType::kINT32, 1}; }
PluginField field_of(const char *name, const Text &v) { return {name, v.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(v.size()) + 1}; }

}  // namespace

int32_t policy_code(const std::string &policy) {
  if (policy == "dense") return SA_DENSE;
  if (policy == "residue") return SA_RESIDUE;
  if (policy == "tile") return SA_TILE;
  if (policy == "column_slash") return SA_COLUMN_SLASH;
  if (policy == "stripe_window") return SA_STRIPE_WINDOW;
  return -1;
}

std::string Parameters::text() const {
  std::string out;
#define SA_ATTRIBUTE(type, name, allowed, ok) out += std::string(#name "=") + render(name) + " ";
#include "attributes.def"
  return out + "certificate=" + render(certificate) + " library=" + kVersion;
}

const std::vector<PluginField> &advertised_fields() {
  static const auto &fields = *new std::vector<PluginField>{
#define SA_ATTRIBUTE(type, name, allowed, ok) advertise(#name, static_cast<const type *>(nullptr)),
#include "attributes.def"
  };
  return fields;
}

std::string read_fields(const PluginFieldCollection *fields, nvinfer1::TensorRTPhase phase, Parameters *parameters) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr))
    return "No fields were given; allowed is one a node attribute.";
  std::vector<std::string> seen;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField &field = fields->fields[i];
    if (field.name == nullptr) return "Field " + std::to_string(i) + " has no name.";
    const std::string name(field.name, strnlen(field.name, 64));
    for (const auto &other : seen)
      if (other == name) return name + " is given twice; give it once.";
    seen.push_back(name);
    std::string error, text;
    if (name == "certificate") {
      error = read(field, "0 or 1", &parameters->certificate);
      if (error.empty() && parameters->certificate != 0 && parameters->certificate != 1)
        error = not_allowed("certificate", render(parameters->certificate), "0 or 1");
    } else if (name == "plugin_version") {
      error = read(field, "'1'", &text);
      if (error.empty() && text != "1") error = not_allowed("plugin_version", render(text), "'1'");
    } else if (name == "plugin_namespace") {
      error = read(field, "''", &text);
      if (error.empty() && !text.empty()) error = not_allowed("plugin_namespace", render(text), "''");
    } else if (name == kVersionField) {
      error = read(field, "the version of this library", &text);
      // Another version may want another workspace than the engine reserved.
      if (error.empty() && phase == nvinfer1::TensorRTPhase::kRUNTIME && text != kVersion)
        error = "The engine was built with version " + render(text) + " of this library, which is version '" + kVersion +
                "'; build the engine again, or load the library it was built with.";
    }
#define SA_ATTRIBUTE(type, attribute, allowed, ok)                                                                          \
  else if (name == #attribute) {                                                                                            \
    error = read(field, allowed, &parameters->attribute);                                                                   \
    if (error.empty()) error = check(#attribute, allowed, parameters->attribute, [](const auto &v) -> bool { return ok; }); \
  }
#include "attributes.def"
    else {
      error = quoted(name.data(), name.size()) + " is not an attribute of SampleAttention; remove it.";
    }
    if (!error.empty()) return error;
  }
  for (const PluginField &wanted : advertised_fields()) {
    bool given = false;
    for (const auto &name : seen) given = given || name == wanted.name;
    if (!given) return std::string("The attribute ") + wanted.name + " is missing; every attribute must stand on the node, rewrite the model again.";
  }
  return check_together(*parameters);
}

std::vector<PluginField> fields_of(const Parameters &parameters) {
  return {
#define SA_ATTRIBUTE(type, name, allowed, ok) field_of(#name, parameters.name),
#include "attributes.def"
      field_of("certificate", parameters.certificate),
      {kVersionField, kVersion, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(kVersion)) + 1},
  };
}

}  // namespace sample_attention::tensorrt

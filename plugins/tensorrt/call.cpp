#include "call.h"

#include <algorithm>
#include <limits>

namespace sample_attention::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

const char *type_name(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT8:
      return "int8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    case DataType::kBOOL:
      return "bool";
    case DataType::kUINT8:
      return "uint8";
    case DataType::kFP8:
      return "float8";
    default:
      return "a narrow type";
  }
}

constexpr const char *kNames[] = {"query", "key", "value", "key_mask"};
constexpr const char *kShapes[] = {"[B, Hq, S, D]", "[B, Hkv, T, D]", "[B, Hkv, T, Dv]", "[B, T]"};

std::string shape_of(const Dims &dims) {
  std::string out = "[";
  for (int i = 0; i < dims.nbDims; ++i) out += (i == 0 ? "" : ", ") + (dims.d[i] < 0 ? std::string("?") : std::to_string(dims.d[i]));
  return out + "]";
}

// Two statements about one extent.
bool agree(int64_t got, int64_t *known) {
  if (got < 0) return true;
  if (*known >= 0 && *known != got) return false;
  *known = got;
  return true;
}

std::string text(int64_t v) { return std::to_string(v); }

}  // namespace

std::string check_arity(int inputs, int outputs, const Parameters &parameters) {
  if (inputs != 3 && inputs != 4) return "The layer has " + text(inputs) + " inputs; allowed are query, key, value and, where a batch is padded, key_mask.";
  if (outputs != 1 + parameters.certificate)
    return "The layer has " + text(outputs) + " outputs; its field certificate asks for " + text(1 + parameters.certificate) + ".";
  return {};
}

std::string check_types(const DataType *types, int inputs) {
  const DataType type = types[kQuery];
  if (type != DataType::kHALF && type != DataType::kBF16 && type != DataType::kFLOAT)
    return std::string("query is ") + type_name(type) + "; allowed are float16, bfloat16 and float32, cast it before the layer.";
  for (int i : {kKey, kValue})
    if (types[i] != type)
      return std::string(kNames[i]) + " is " + type_name(types[i]) + " and query is " + type_name(type) + "; query, key and value must have one type.";
  if (inputs > kKeyMask && types[kKeyMask] != DataType::kBOOL)
    return std::string("key_mask is ") + type_name(types[kKeyMask]) + "; allowed is bool (true = real token), cast it before the layer.";
  return {};
}

std::string read_extents(const Dims *dims, int inputs, Extents *e) {
  for (int i = 0; i < inputs; ++i) {
    const int rank = i == kKeyMask ? 2 : 4;
    if (dims[i].nbDims != rank) return std::string(kNames[i]) + " has shape " + shape_of(dims[i]) + "; allowed is " + kShapes[i] + ".";
  }
  const auto at = [&](int input, int axis) -> int64_t { return dims[input].d[axis]; };
  const bool fits = agree(at(kQuery, 0), &e->batch) && agree(at(kKey, 0), &e->batch) && agree(at(kValue, 0), &e->batch) && agree(at(kQuery, 1), &e->heads) &&
                    agree(at(kKey, 1), &e->kv_heads) && agree(at(kValue, 1), &e->kv_heads) && agree(at(kQuery, 2), &e->queries) &&
                    agree(at(kKey, 2), &e->keys) && agree(at(kValue, 2), &e->keys) && agree(at(kQuery, 3), &e->head_dim) && agree(at(kKey, 3), &e->head_dim) &&
                    agree(at(kValue, 3), &e->value_dim) && (inputs <= kKeyMask || (agree(at(kKeyMask, 0), &e->batch) && agree(at(kKeyMask, 1), &e->keys)));
  if (fits) return {};
  std::string shapes, wanted;
  for (int i = 0; i < inputs; ++i) {
    shapes += (i == 0 ? "" : ", ") + std::string(kNames[i]) + " " + shape_of(dims[i]);
    wanted += (i == 0 ? "" : ", ") + std::string(kShapes[i]);
  }
  return "The shapes do not fit together: " + shapes + "; allowed are " + wanted + ".";
}

std::string check_heads(const Extents &e, const Parameters &p) {
  if (e.heads >= 0 && e.kv_heads > 0 && e.heads % e.kv_heads != 0)
    return "query has " + text(e.heads) + " heads and key has " + text(e.kv_heads) + "; query heads must be a multiple of key heads.";
  if (e.kv_heads == 0) return "key has 0 heads; allowed is at least 1.";
  if (e.heads >= 0) {
    const struct {
      const char *name;
      size_t count;
    } lists[] = {{"alpha", p.alpha.size()}, {"alpha_slash", p.alpha_slash.size()}};
    for (const auto &list : lists)
      if (list.count != 1 && int64_t(list.count) != e.heads)
        return std::string(list.name) + " has " + std::to_string(list.count) + " values and query has " + text(e.heads) +
               " heads; allowed is one value, or one a query head.";
  }
  if (e.queries >= 0 && e.keys >= 0 && e.queries > e.keys)
    return "query has " + text(e.queries) + " rows and key has " + text(e.keys) +
           "; allowed are at most as many rows as keys, because query row i stands at position T - S + i. Put the past in front of key and value.";
  return {};
}

std::string make_problem(const Extents &e, DataType type, bool has_key_mask, const Parameters &p, sa_problem *problem) {
  for (int64_t extent : {e.batch, e.heads, e.kv_heads, e.queries, e.keys, e.head_dim, e.value_dim})
    if (extent < 0 || extent > std::numeric_limits<int32_t>::max()) return "An extent of the inputs is " + text(extent) + "; allowed are 0 to 2147483647.";
  *problem = {};
  problem->dtype = type == DataType::kHALF ? SA_FLOAT16 : type == DataType::kBF16 ? SA_BFLOAT16 : SA_FLOAT32;
  problem->batch = static_cast<int32_t>(e.batch);
  problem->heads = static_cast<int32_t>(e.heads);
  problem->kv_heads = static_cast<int32_t>(e.kv_heads);
  problem->queries = static_cast<int32_t>(e.queries);
  problem->keys = static_cast<int32_t>(e.keys);
  problem->head_dim = static_cast<int32_t>(e.head_dim);
  problem->value_dim = static_cast<int32_t>(e.value_dim);
  problem->scale = p.scale;
  problem->softcap = p.softcap;
  problem->policy = policy_code(p.policy);
  problem->alpha = *std::min_element(p.alpha.begin(), p.alpha.end());
  problem->alpha_slash = *std::min_element(p.alpha_slash.begin(), p.alpha_slash.end());
  problem->max_density = p.max_density;
  problem->stride = p.stride;
  problem->sample_rows = p.sample_rows;
  problem->value_weight = p.value_weight;
  problem->segment = p.segment;
  problem->sample_ratio = p.sample_ratio;
  problem->window_ratio = p.window_ratio;
  problem->block_q = p.block_q;
  problem->block_k = p.block_k;
  problem->window = p.window;
  problem->sink = p.sink;
  problem->dense_rows = p.dense_rows;
  problem->min_length = p.min_length;
  problem->has_key_mask = has_key_mask ? 1 : 0;
  problem->has_certificate = p.certificate;
  return {};
}

}  // namespace sample_attention::tensorrt

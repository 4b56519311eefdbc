// What happens before a call: creation, clones, types, shapes, formats, configuration, workspace, timing-cache id, serialisation, contexts.
#include "driver.h"
#include "support/expressions.h"

#include <cstring>
#include <functional>
#include <random>
#include <set>

namespace driver {

void Node::fill(Fields *f) const {
  f->add("scale", scale);
  f->add("softcap", softcap);
  f->add("is_causal", is_causal);
  f->add("policy", policy);
  f->add("alpha", alpha);
  f->add("alpha_slash", alpha_slash);
  f->add("max_density", max_density);
  f->add("stride", stride);
  f->add("sample_rows", sample_rows);
  f->add("value_weight", value_weight);
  f->add("segment", segment);
  f->add("sample_ratio", sample_ratio);
  f->add("window_ratio", window_ratio);
  f->add("block_q", block_q);
  f->add("block_k", block_k);
  f->add("window", window);
  f->add("sink", sink);
  f->add("dense_rows", dense_rows);
  f->add("min_length", min_length);
  if (certificate != 0) f->add("certificate", certificate);
}

Plugin create(Library &library, const Node &node, const char *name) {
  Fields fields;
  node.fill(&fields);
  return Plugin(library.creator()->createPlugin(std::string(name).c_str(), fields.collection(), TensorRTPhase::kBUILD));
}

Plugin recreate(Library &library, const nvinfer1::PluginFieldCollection &serialised) {
  Fields plan(serialised);
  return Plugin(library.creator()->createPlugin("layer0", plan.collection(), TensorRTPhase::kRUNTIME));
}

Descs describe(const Shape &s, DataType type, bool certificate) {
  const auto tensor = [](DataType t, std::vector<int64_t> dims) {
    PluginTensorDesc d{{}, t, TensorFormat::kLINEAR, 1.0f};
    d.dims.nbDims = static_cast<int32_t>(dims.size());
    std::copy(dims.begin(), dims.end(), d.dims.d);
    return d;
  };
  Descs out;
  out.inputs = {tensor(type, {s.batch, s.heads, s.queries, s.head_dim}), tensor(type, {s.batch, s.kv_heads, s.keys, s.head_dim}),
                tensor(type, {s.batch, s.kv_heads, s.keys, s.value_dim})};
  if (s.mask) out.inputs.push_back(tensor(DataType::kBOOL, {s.batch, s.keys}));
  out.outputs = {tensor(type, {s.batch, s.heads, s.queries, s.value_dim})};
  if (certificate) out.outputs.push_back(tensor(DataType::kFLOAT, {s.batch, s.heads, 2}));
  return out;
}

std::vector<DynamicPluginTensorDesc> profile(const std::vector<PluginTensorDesc> &opt, const std::vector<PluginTensorDesc> &max) {
  std::vector<DynamicPluginTensorDesc> out(opt.size());
  for (size_t i = 0; i < opt.size(); ++i) {
    out[i].desc = opt[i];
    out[i].min = out[i].opt = opt[i].dims;
    out[i].max = max[i].dims;
    // What a profile leaves open is -1 in the description.
    for (int32_t axis = 0; axis < opt[i].dims.nbDims; ++axis)
      if (opt[i].dims.d[axis] != max[i].dims.d[axis]) out[i].desc.dims.d[axis] = -1;
  }
  return out;
}

size_t workspace_of(IPluginV3 &plugin, const Shape &most, DataType type, bool certificate) {
  const Descs d = describe(most, type, certificate);
  const auto in = profile(d.inputs, d.inputs), out = profile(d.outputs, d.outputs);
  return build(plugin)->getWorkspaceSize(in.data(), static_cast<int32_t>(in.size()), out.data(), static_cast<int32_t>(out.size()));
}

namespace {

constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};

void check_creation(Library &library) {
  auto *creator = library.creator();
  const auto *names = creator->getFieldNames();
  CHECK(names != nullptr && names->nbFields == 19);
  CHECK(names == creator->getFieldNames());
  CHECK(std::string(creator->getPluginName()) == "SampleAttention");
  Plugin plugin = create(library, Node());
  CHECK(plugin != nullptr);
  CHECK(library.last_error().empty());
  // Refusals: null, a sentence, no leak.
  const nvinfer1::PluginFieldCollection none{0, nullptr}, broken{3, nullptr}, negative{-1, nullptr};
  for (const auto *bad : {static_cast<const nvinfer1::PluginFieldCollection *>(nullptr), &none, &broken, &negative}) {
    CHECK(Plugin(creator->createPlugin("layer0", bad, TensorRTPhase::kBUILD)) == nullptr);
    CHECK(!library.last_error().empty());
  }
  for (int i = 0; i < names->nbFields; ++i) {
    Fields fields;
    Node().fill(&fields);
    fields.remove(names->fields[i].name);
    CHECK(Plugin(creator->createPlugin("layer0", fields.collection(), TensorRTPhase::kBUILD)) == nullptr);
    CHECK(library.last_error().find(names->fields[i].name) != std::string::npos);
  }
  Fields wide;
  Node().fill(&wide);
  wide.remove("sink");
  const int64_t too_wide = (int64_t(1) << 32) + 5;
  wide.add("sink", &too_wide, PluginFieldType::kINT64, 1, 8);
  CHECK(Plugin(creator->createPlugin("layer0", wide.collection(), TensorRTPhase::kBUILD)) == nullptr);
  CHECK(library.last_error().find("sink is 4294967301") != std::string::npos);
  Node not_a_number;
  not_a_number.scale = NAN;
  CHECK(create(library, not_a_number) == nullptr);
  library.last_error();
  CHECK(Plugin(creator->createPlugin(nullptr, nullptr, TensorRTPhase::kRUNTIME)) == nullptr);
  library.last_error();
}

void check_capabilities(Library &library) {
  Plugin plugin = create(library, Node());
  if (!CHECK(core(*plugin) != nullptr && build(*plugin) != nullptr && runtime(*plugin) != nullptr)) return;
  // Through the base that the caller casts to: a wrong base answers with another interface's kind.
  CHECK(std::string(core(*plugin)->getInterfaceInfo().kind) == "PLUGIN_V3ONE_CORE");
  CHECK(std::string(build(*plugin)->getInterfaceInfo().kind) == "PLUGIN_V3ONE_BUILD");
  CHECK(std::string(runtime(*plugin)->getInterfaceInfo().kind) == "PLUGIN_V3ONE_RUNTIME");
  CHECK(plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(7)) == nullptr);
  auto *creator = library.creator();
  CHECK(std::string(core(*plugin)->getPluginName()) == creator->getPluginName());
  CHECK(std::string(core(*plugin)->getPluginVersion()) == creator->getPluginVersion());
  CHECK(std::string(core(*plugin)->getPluginNamespace()) == creator->getPluginNamespace());
}

void check_types(Library &library) {
  for (bool certificate : {false, true}) {
    Node node;
    node.certificate = certificate ? 1 : 0;
    Plugin plugin = create(library, node);
    const int32_t outputs = build(*plugin)->getNbOutputs();
    CHECK(outputs == (certificate ? 2 : 1));
    for (DataType type : kTypes)
      for (int32_t inputs : {3, 4}) {
        const DataType in[] = {type, type, type, DataType::kBOOL};
        DataType out[] = {DataType::kUINT8, DataType::kUINT8};
        CHECK(build(*plugin)->getOutputDataTypes(out, outputs, in, inputs) == 0);
        CHECK(out[0] == type);
        CHECK(out[1] == (certificate ? DataType::kFLOAT : DataType::kUINT8));
      }
    DataType out[3];
    for (int32_t wrong : {0, 1, 2}) {
      DataType in[] = {DataType::kHALF, DataType::kHALF, DataType::kHALF, DataType::kBOOL};
      in[wrong] = wrong == 0 ? DataType::kINT32 : DataType::kFLOAT;
      CHECK(build(*plugin)->getOutputDataTypes(out, outputs, in, 3) != 0);
      CHECK(!library.last_error().empty());
    }
    const DataType mask[] = {DataType::kHALF, DataType::kHALF, DataType::kHALF, DataType::kINT32, DataType::kHALF};
    CHECK(build(*plugin)->getOutputDataTypes(out, outputs, mask, 4) != 0);
    CHECK(build(*plugin)->getOutputDataTypes(out, outputs, mask, 5) != 0);
    CHECK(build(*plugin)->getOutputDataTypes(out, outputs, mask, 2) != 0);
    CHECK(build(*plugin)->getOutputDataTypes(out, outputs + 1, mask, 3) != 0);
    library.last_error();
  }
}

// Dims of the inputs; an entry below 0 is the symbol -1 - entry.
int32_t shapes(Plugin &plugin, ExpressionBuilder &builder, const std::vector<std::vector<int64_t>> &dims, std::vector<nvinfer1::DimsExprs> *out) {
  std::vector<nvinfer1::DimsExprs> in(dims.size());
  std::memset(static_cast<void *>(in.data()), 0x5a, in.size() * sizeof(in[0]));  // entries past the rank are rubbish
  for (size_t i = 0; i < dims.size(); ++i) {
    in[i].nbDims = static_cast<int32_t>(dims[i].size());
    for (size_t axis = 0; axis < dims[i].size(); ++axis)
      in[i].d[axis] = dims[i][axis] < 0 ? builder.symbol(-1 - dims[i][axis]) : builder.constant(dims[i][axis]);
  }
  out->assign(build(*plugin)->getNbOutputs(), {});
  return build(*plugin)->getOutputShapes(in.data(), static_cast<int32_t>(in.size()), nullptr, 0, out->data(), static_cast<int32_t>(out->size()), builder);
}

void check_shapes(Library &library) {
  constexpr int64_t B = -1, S = -2, T = -3;
  Node node;
  node.certificate = 1;
  Plugin plugin = create(library, node);
  const auto at = [](const nvinfer1::IDimensionExpr *e, const Sizes &sizes) { return static_cast<const Expression *>(e)->at(sizes); };
  for (bool mask : {false, true}) {
    ExpressionBuilder builder;
    std::vector<nvinfer1::DimsExprs> out;
    std::vector<std::vector<int64_t>> dims{{B, 6, S, 64}, {B, 2, T, 64}, {B, 2, T, 48}};
    if (mask) dims.push_back({B, T});
    if (!CHECK(shapes(plugin, builder, dims, &out) == 0)) return;
    CHECK(out[0].nbDims == 4 && out[1].nbDims == 3);
    for (const Sizes &sizes : {Sizes{1, 1, 1}, Sizes{3, 5, 9}, Sizes{2, 300, 4000}}) {
      CHECK(at(out[0].d[0], sizes) == sizes[0]);
      CHECK(at(out[0].d[1], sizes) == 6);
      CHECK(at(out[0].d[2], sizes) == sizes[1]);
      CHECK(at(out[0].d[3], sizes) == 48);
      CHECK(at(out[1].d[0], sizes) == sizes[0]);
      CHECK(at(out[1].d[1], sizes) == 6);
      CHECK(at(out[1].d[2], sizes) == 2);
    }
    CHECK(out[0].d[3]->isConstant() && out[0].d[1]->isConstant() && !out[0].d[2]->isConstant());
  }
  const std::vector<std::vector<std::vector<int64_t>>> refused{
      {{B, 6, S, 64}, {B, 4, T, 64}, {B, 4, T, 64}},                // heads
      {{B, 6, S, 64}, {B, 2, T, 32}, {B, 2, T, 64}},                // head size
      {{B, 6, S, 64}, {B, 2, T, 64}, {B, 3, T, 64}},                // heads of value
      {{B, 6, 65, 64}, {B, 2, 64, 64}, {B, 2, 64, 64}},             // more rows than keys
      {{B, S, 384}, {B, 2, T, 64}, {B, 2, T, 64}},                  // rank
      {{B, 6, S, 64}, {B, 2, T, 64}, {B, 2, T, 64}, {B, 1, S, T}},  // a mask of rank 4
      {{B, 6, S, 64}, {B, 2, T, 64}},                               // two inputs
      {{2, 6, S, 64}, {3, 2, T, 64}, {B, 2, T, 64}},                // batch
  };
  for (const auto &dims : refused) {
    ExpressionBuilder builder;
    std::vector<nvinfer1::DimsExprs> out;
    CHECK(shapes(plugin, builder, dims, &out) != 0);
    CHECK(!library.last_error().empty());
  }
  Node heads;
  heads.alpha = {0.5f, 0.6f, 0.7f};
  Plugin three = create(library, heads);
  ExpressionBuilder builder;
  std::vector<nvinfer1::DimsExprs> out;
  CHECK(shapes(three, builder, {{B, 3, S, 64}, {B, 3, T, 64}, {B, 3, T, 64}}, &out) == 0);
  CHECK(shapes(three, builder, {{B, 6, S, 64}, {B, 3, T, 64}, {B, 3, T, 64}}, &out) != 0);
  CHECK(library.last_error().find("alpha has 3 values and query has 6 heads") != std::string::npos);
}

// Every type and format at every position. What lies behind the position is not set yet and must not matter.
void check_formats(Library &library) {
  for (bool mask : {false, true})
    for (bool certificate : {false, true}) {
      Node node;
      node.certificate = certificate ? 1 : 0;
      Plugin plugin = create(library, node);
      const Descs d = describe({2, 4, 2, 30, 50, 64, 64, mask}, DataType::kHALF, certificate);
      const auto inputs = static_cast<int32_t>(d.inputs.size()), outputs = static_cast<int32_t>(d.outputs.size());
      std::vector<std::pair<DataType, TensorFormat>> chosen;
      std::vector<std::vector<DataType>> accepted;
      const std::function<void(int32_t)> walk = [&](int32_t position) {
        if (position == inputs + outputs) {
          accepted.emplace_back();
          for (const auto &c : chosen) accepted.back().push_back(c.first);
          return;
        }
        for (int32_t type = 0; type < nvinfer1::EnumMax<DataType>(); ++type)
          for (int32_t format = 0; format < nvinfer1::EnumMax<TensorFormat>(); ++format) {
            chosen.emplace_back(static_cast<DataType>(type), static_cast<TensorFormat>(format));
            bool answers[2];
            for (int poison : {0, 1}) {
              std::vector<DynamicPluginTensorDesc> tensors(inputs + outputs);
              std::memset(static_cast<void *>(tensors.data()), poison == 0 ? 0 : 0xcd, tensors.size() * sizeof(tensors[0]));
              for (int32_t i = 0; i <= position; ++i) {
                tensors[i].desc = i < inputs ? d.inputs[i] : d.outputs[i - inputs];
                tensors[i].min = tensors[i].opt = tensors[i].max = tensors[i].desc.dims;
                tensors[i].desc.type = chosen[i].first;
                tensors[i].desc.format = chosen[i].second;
              }
              answers[poison] = build(*plugin)->supportsFormatCombination(position, tensors.data(), inputs, outputs);
            }
            CHECK(answers[0] == answers[1]);
            // A format too many is not followed: it would be combined with every other.
            if (answers[0] && CHECK(chosen.back().second == TensorFormat::kLINEAR)) walk(position + 1);
            chosen.pop_back();
          }
      };
      walk(0);
      CHECK(accepted.size() == 3);  // float32, float16, bfloat16
      CHECK(static_cast<int32_t>(accepted.size()) <= build(*plugin)->getFormatCombinationLimit());
      for (const auto &types : accepted) {
        std::vector<DataType> declared(outputs);
        CHECK(build(*plugin)->getOutputDataTypes(declared.data(), outputs, types.data(), inputs) == 0);
        for (int32_t i = 0; i < outputs; ++i) CHECK(declared[i] == types[inputs + i]);
      }
    }
}

void check_configuration(Library &library) {
  const Shape opt{1, 4, 2, 64, 64, 64, 64, true}, max{3, 4, 2, 500, 900, 64, 64, true};
  for (DataType type : kTypes) {
    Plugin original = create(library, Node()), plugin(original->clone());
    original.reset();
    const Descs small = describe(opt, type, false), large = describe(max, type, false);
    const auto in = profile(small.inputs, large.inputs), out = profile(small.outputs, large.outputs);
    auto *b = build(*plugin);
    CHECK(b->configurePlugin(in.data(), 4, out.data(), 1) == 0);
    CHECK(b->configurePlugin(in.data(), 4, out.data(), 1) == 0);
    const size_t bytes = b->getWorkspaceSize(in.data(), 4, out.data(), 1);
    CHECK(bytes == workspace_of(*plugin, max, type, false));
    CHECK(bytes == build(*Plugin(plugin->clone()))->getWorkspaceSize(in.data(), 4, out.data(), 1));
    const int32_t count = b->getNbTactics();
    std::vector<int32_t> tactics(count);
    if (count > 0) CHECK(b->getValidTactics(tactics.data(), count) == 0);
    CHECK(std::set<int32_t>(tactics.begin(), tactics.end()).size() == tactics.size() && std::count(tactics.begin(), tactics.end(), 0) == 0);
    if (b->getInterfaceInfo().major >= 2) CHECK(static_cast<nvinfer1::IPluginV3OneBuildV2 *>(b)->getAliasedInput(0) == -1);
    CHECK(library.last_error().empty());
  }
  // Refused when the profile is configured, with a sentence.
  Plugin plugin = create(library, Node());
  for (const Shape &bad : {Shape{1, 4, 3, 64, 64, 64, 64, false}, Shape{1, 4, 2, 65, 64, 64, 64, false}, Shape{1, 4, 2, 64, 64, 1000, 64, false}}) {
    const Descs d = describe(bad, DataType::kHALF, false);
    const auto in = profile(d.inputs, d.inputs), out = profile(d.outputs, d.outputs);
    CHECK(build(*plugin)->configurePlugin(in.data(), 3, out.data(), 1) != 0);
    CHECK(!library.last_error().empty());
  }
  Descs d = describe(opt, DataType::kHALF, false);
  auto in = profile(d.inputs, d.inputs), out = profile(d.outputs, d.outputs);
  in[1].desc.format = TensorFormat::kHWC8;
  CHECK(build(*plugin)->configurePlugin(in.data(), 4, out.data(), 1) != 0);
  CHECK(!library.last_error().empty());
}

// TensorRT reserves the workspace of the profile's largest shapes once and gives it to every smaller call.
void check_workspace(Library &library) {
  std::mt19937 random(1);
  const auto draw = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
  for (const char *policy : {"tile", "residue", "dense"})
    for (int round = 0; round < 60; ++round) {
      Node node;
      node.policy = policy;
      node.block_q = 128;
      node.block_k = 64;
      node.sample_rows = 32;
      node.min_length = static_cast<int32_t>(draw(0, 3000));
      Plugin plugin = create(library, node);
      const int64_t keys = draw(1, 20000);
      Shape most{draw(1, 9), 8, 2, draw(1, keys), keys, 64, 64, draw(0, 1) == 1};
      const size_t bytes = workspace_of(*plugin, most, DataType::kHALF, false);
      Shape less = most;
      less.batch = draw(1, most.batch);
      less.queries = round % 3 == 0 ? std::min<int64_t>(draw(1, 16), most.queries) : draw(1, most.queries);
      less.keys = draw(less.queries, most.keys);
      CHECK(workspace_of(*plugin, less, DataType::kHALF, false) <= bytes);
    }
  Plugin plugin = create(library, Node());
  const Descs small = describe({1, 8, 2, 512, 512, 64, 64, false}, DataType::kHALF, false),
              large = describe({4, 8, 2, 8192, 8192, 64, 64, false}, DataType::kHALF, false);
  const auto out = profile(small.outputs, large.outputs), fixed_out = profile(small.outputs, small.outputs);
  const auto in = profile(small.inputs, large.inputs), fixed_in = profile(small.inputs, small.inputs);
  // By the largest shape, not by the best.
  CHECK(build(*plugin)->getWorkspaceSize(in.data(), 3, out.data(), 1) > build(*plugin)->getWorkspaceSize(fixed_in.data(), 3, fixed_out.data(), 1));
}

void check_timing_cache_id(Library &library) {
  std::vector<Node> nodes(21);
  nodes[1].scale = 0.36f;
  nodes[2].softcap = 30;
  nodes[3].policy = "residue";
  nodes[4].alpha = {0.61f};
  nodes[5].alpha_slash = {0.71f};
  nodes[6].stride = 4;
  nodes[7].sample_rows = 8;
  nodes[8].value_weight = 0;
  nodes[9].segment = 64;
  nodes[10].sample_ratio = 0.25f;
  nodes[11].window_ratio = 0.12f;
  nodes[12].block_q = 64;
  nodes[13].block_k = 32;
  nodes[14].window = 10;
  nodes[15].sink = 6;
  nodes[16].dense_rows = 8;
  nodes[17].min_length = 18;
  nodes[18].certificate = 1;
  nodes[19].alpha = {0.6f, 0.6f};
  nodes[20].max_density = 0.99f;
  std::set<std::string> ids;
  for (const Node &node : nodes) {
    Plugin plugin = create(library, node);
    if (!CHECK(plugin != nullptr)) return;
    const std::string id = build(*plugin)->getTimingCacheID();
    CHECK(ids.insert(id).second);
    CHECK(id == build(*Plugin(plugin->clone()))->getTimingCacheID());
    CHECK(id == build(*create(library, node, "another layer"))->getTimingCacheID());
  }
}

void check_serialisation(Library &library) {
  Node node;
  node.alpha = {0.5f, 0.25f, 1.0f, 0.75f};
  node.alpha_slash = {0.3f, 0.4f, 0.5f, 0.6f};
  node.softcap = 20;
  node.policy = "column_slash";
  node.value_weight = 0;
  node.certificate = 1;
  Plugin built = create(library, node), clone(built->clone());
  const auto *first = runtime(*clone)->getFieldsToSerialize();
  if (!CHECK(first != nullptr && first->nbFields > 0)) return;
  CHECK(first == runtime(*clone)->getFieldsToSerialize());
  // What was asked for stands there, under the advertised types: an engine that drops or defaults a field runs another operator.
  Fields asked;
  node.fill(&asked);
  Fields plan(*first);
  const auto *wanted = asked.collection();
  for (int i = 0; i < wanted->nbFields; ++i) {
    const PluginField &w = wanted->fields[i], *f = plan.find(w.name);
    CHECK(f != nullptr && f->type == w.type && f->length == w.length && std::memcmp(f->data, w.data, bytes_of(w)) == 0);
  }
  built.reset();
  clone.reset();  // the builder is gone
  Plugin run = recreate(library, *plan.collection());
  if (!CHECK(run != nullptr)) return;
  CHECK(same(*plan.collection(), *runtime(*run)->getFieldsToSerialize()));
  Plugin copy(run->clone());
  CHECK(same(*plan.collection(), *runtime(*copy)->getFieldsToSerialize()));
  run.reset();
  CHECK(same(*plan.collection(), *runtime(*copy)->getFieldsToSerialize()));
}

void check_contexts(Library &library) {
  Plugin built = create(library, Node());
  Plugin engine = recreate(library, *runtime(*built)->getFieldsToSerialize());
  built.reset();
  Plugin first(runtime(*engine)->attachToContext(nullptr)), second(runtime(*engine)->attachToContext(nullptr));
  CHECK(first != nullptr && second != nullptr && first != second && first != engine && second != engine);
  if (first == engine || second == engine || first == second) std::abort();  // what follows would free one object twice
  CHECK(runtime(*first)->setTactic(0) == 0);
  Plugin of_context(first->clone());
  CHECK(same(*runtime(*of_context)->getFieldsToSerialize(), *runtime(*second)->getFieldsToSerialize()));
  first.reset();
  engine.reset();
  CHECK(runtime(*second)->getFieldsToSerialize()->nbFields > 0);
  of_context.reset();
}

}  // namespace

void check_life_cycle(Library &library) {
  check_creation(library);
  check_capabilities(library);
  check_types(library);
  check_shapes(library);
  check_formats(library);
  check_configuration(library);
  check_workspace(library);
  check_timing_cache_id(library);
  check_serialisation(library);
  check_contexts(library);
}

}  // namespace driver

// The sm_90a kernels: what they take, and how their stages are started. Everything that is launched here is sized by the shape alone.
#include "../kernels/filtering/filter_params.h"
#include "built.h"
#include "contract.h"
#include "launchers.h"
#include "plan.h"
#include "stages.h"
#include "status.h"
#include "tensor_map.h"

#include <algorithm>

namespace sample_attention {
namespace {

bool head_dim_built(int head_dim) {
#define SA_CASE(D) \
  if (head_dim == D) return true;
  SA_FOR_EACH_HEAD_DIM(SA_CASE)
#undef SA_CASE
  return false;
}

Status takes_tensors(const sa_problem &p) {
  if (p.dtype != SA_FLOAT16 && p.dtype != SA_BFLOAT16) return fail(SA_UNSUPPORTED, "float32 is not built (built: float16, bfloat16)");
  if (!head_dim_built(p.head_dim)) return fail(SA_UNSUPPORTED, "head_dim %d is not built (built: " SA_HEAD_DIMS_TEXT ")", p.head_dim);
  if (p.value_dim != p.head_dim) return fail(SA_UNSUPPORTED, "value_dim %d differs from head_dim %d", p.value_dim, p.head_dim);
  return {};
}

Status selects(const sa_problem &p, int) {
  Status status = takes_tensors(p);
  if (!status.ok()) return status;
  if (per_head(p)) return fail(SA_UNSUPPORTED, "policy %s is not built", p.policy == SA_COLUMN_SLASH ? "column_slash" : "stripe_window");
  if (p.block_q < kAttendRows) return fail(SA_UNSUPPORTED, "block_q %d is not built (built: 128, 256)", p.block_q);
  if (p.policy == SA_RESIDUE && p.block_k / p.stride < 2)
    return fail(SA_UNSUPPORTED, "stride %d with block_k %d is not built (built: at least 2 keys of a block in a slice, block_k / stride)", p.stride, p.block_k);
  if (key_blocks(p) > kMaxBlocks)
    return fail(SA_UNSUPPORTED, "%d keys in blocks of %d make %d blocks, more than the %d that fit shared memory", p.keys, p.block_k, key_blocks(p),
                kMaxBlocks);
  return {};
}

Status attends(const sa_problem &p, bool listed, int) {
  Status status = takes_tensors(p);
  if (status.ok() && listed && p.block_q < kAttendRows) return fail(SA_UNSUPPORTED, "block_q %d is not built (built: 128, 256)", p.block_q);
  return status;
}

Status decodes(const sa_problem &p, int) { return takes_tensors(p); }

Status check_tensors(const sa_prefill_params &params) { return check_alignment(params, "sm90"); }

// Calls f(Launchers<dtype, head_dim>{}) for the problem's instance; takes_tensors() has checked that it is built.
template <class F>
auto dispatch(const sa_problem &problem, F f) {
#define SA_CASE(D) \
  if (problem.head_dim == D) return problem.dtype == SA_BFLOAT16 ? f(Launchers<SA_BFLOAT16, D>{}) : f(Launchers<SA_FLOAT16, D>{});
  SA_FOR_EACH_HEAD_DIM(SA_CASE)
#undef SA_CASE
  return decltype(f(Launchers<SA_FLOAT16, 0>{})){};
}

MapShape map_shape(const sa_problem &p, int heads) { return {p.dtype, p.head_dim, heads, p.batch}; }

Status clear_tickets(int32_t *tickets, cudaStream_t stream) {
  return from_cuda(cudaMemsetAsync(tickets, 0, kTickets * sizeof(int32_t), stream), "Clearing the work counters");
}

Status attend(const Call &call, const sa_block_lists *lists, void *base) {
  const sa_prefill_params &params = call.params;
  const sa_problem &p = params.problem;
  Plan plan(p);
  AttendSpace space(p, plan, base);
  Status status;
  if (lists == nullptr) status = clear_tickets(space.tickets, call.stream);  // else the work order does
  if (!status.ok()) return status;
  const int stage_keys = dispatch(p, [](auto instance) { return decltype(instance)::attend_stage_keys(); });
  const int unit = lists != nullptr ? std::min(p.block_k, stage_keys) : stage_keys;
  AttendParams a{};
  status = encode_rows(&a.query, params.query, map_shape(p, p.heads), p.queries, kAttendRows);
  if (status.ok()) status = encode_rows(&a.key, params.key, map_shape(p, p.kv_heads), p.keys, unit);
  if (status.ok()) status = encode_rows(&a.value, params.value, map_shape(p, p.kv_heads), p.keys, unit);
  if (status.ok()) status = encode_rows(&a.output, params.output, map_shape(p, p.heads), p.queries, 64);
  if (!status.ok()) return status;
  a.ticket = space.tickets;
  status = fill_work(call, lists, stage_keys, space.order, &a);
  if (!status.ok()) return status;
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::attend(a, call.multiprocessors, call.stream); }),
                   "Launching the prefill kernel");
}

Status slice_maps(SliceMaps *maps, const sa_tensor &tensor, const MapShape &shape, int stride, int rows, int box_rows) {
  maps->longer_count = rows % stride;
  int floor = rows / stride;
  Status status;
  if (maps->longer_count > 0) {
    status = encode_slices(&maps->longer, tensor, shape, stride, maps->longer_count, floor + 1, box_rows);
    if (!status.ok()) return status;
  }
  if (floor > 0) {
    status = encode_slices(&maps->shorter, tensor, shape, stride, stride, floor, box_rows);
    if (!status.ok()) return status;
  }
  // A missing map stands for slices that have no row: the other one answers them with zeros.
  if (floor == 0) maps->shorter = maps->longer;
  if (maps->longer_count == 0) maps->longer = maps->shorter;
  return {};
}

Status weigh(const Call &call, const Plan &plan, const SelectSpace &space, float *weight, int by_value) {
  const sa_prefill_params &params = call.params;
  const sa_problem &p = params.problem;
  WeightParams w{};
  w.value = params.value.data;
  w.value_b = params.value.stride_b;
  w.value_h = params.value.stride_h;
  w.value_s = params.value.stride_s;
  w.weight = weight;
  w.bounds = params.bounds;
  w.tickets = space.tickets;
  w.ticket_count = kTickets;
  w.weight_row = plan.weight_row;
  w.key_log2 = plan.key_log2;
  w.batch = p.batch;
  w.kv_heads = p.kv_heads;
  w.keys = p.keys;
  w.by_value = by_value;
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::weigh(w, call.stream); }), "Launching the value weight kernel");
}

// The weights do not depend on the query tiles.
Status begin(const Call &call, int chunk, void *base) {
  const sa_problem &p = call.params.problem;
  const Plan plan(p);
  const SelectSpace space(p, plan, chunk, base);
  Status status = weigh(call, plan, space, space.weight, p.value_weight);
  if (status.ok() && space.ones != space.weight) status = weigh(call, plan, space, space.ones, 0);
  return status;
}

// Scores the tiles [first_tile, first_tile + tiles), as many heads at a time as the table holds, and calls next(SampleParams) on the table of each. Tiles that
// meet the last dense_rows are left out.
template <class F>
Status score(const Call &call, int first_tile, int tiles, const Plan &plan, const SelectSpace &space, const float *weight, int dense_rows, F next) {
  const sa_prefill_params &params = call.params;
  const sa_problem &p = params.problem;
  SampleParams s{};
  Status status = slice_maps(&s.query, params.query, map_shape(p, p.heads), 1 << plan.row_log2, p.queries, kSampleRows);
  if (status.ok()) status = slice_maps(&s.key, params.key, map_shape(p, p.kv_heads), 1 << plan.key_log2, p.keys, kSampleKeys);
  if (!status.ok()) return status;
  const TableShape shape(p, first_tile, tiles);
  const HeadSplit split(p, shape, space.table_bytes);
  const int heads = p.batch * p.heads;
  s.weight = weight;
  s.weight_row = plan.weight_row;
  s.alpha = params.alpha;
  s.alpha_all = p.alpha;
  s.bounds = params.bounds;
  s.ticket = space.tickets;
  s.scale = p.scale;
  s.softcap = p.softcap;
  s.batch = p.batch;
  s.heads = p.heads;
  s.kv_heads = p.kv_heads;
  s.queries = p.queries;
  s.keys = p.keys;
  s.head_unit = split.unit;
  s.first_tile = first_tile;
  s.tiles = tiles;
  s.blocks = plan.blocks;
  s.dense_rows = std::min(dense_rows, p.keys);
  s.classes = plan.classes;
  s.row_log2 = plan.row_log2;
  s.key_log2 = plan.key_log2;
  s.tile_rows_log2 = plan.tile_rows_log2;
  s.block_keys_log2 = plan.block_keys_log2;
  s.full_groups = shape.full_groups;
  s.groups = shape.groups;
  s.full_rows = shape.full_rows;
  s.splits = shape.splits;
  s.group_tiles = shape.group_tiles;
  s.group_step = shape.group_step;
  s.slice_tiles = shape.slice_tiles;
  for (s.first_head = 0; s.first_head < heads && status.ok(); s.first_head += split.heads) {
    s.head_count = std::min(split.heads, heads - s.first_head);
    Carver carver(space.table);
    s.table = carver.take<uint16_t>(shape.entries * s.head_count);
    s.reference = carver.take<float>(shape.references * s.head_count);
    s.lse = carver.take<float>(shape.lses * s.head_count);
    status = from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::sample(s, call.multiprocessors, call.stream); }),
                       "Launching the sampling kernel");
    if (status.ok()) status = next(s);
  }
  return status;
}

Status sample(const Call &call, int first_tile, int tiles, int chunk, float *mass, void *base) {
  const sa_problem &p = call.params.problem;
  const Plan plan(p);
  const SelectSpace space(p, plan, chunk, base);
  return score(call, first_tile, tiles, plan, space, space.weight, p.dense_rows, [&](SampleParams &s) {
    s.mass = mass;
    return from_cuda(launch_reduce(s, call.stream), "Launching the reduction kernel");
  });
}

// Scores the chunk once more, unweighted: the tables of sample() are gone, and a certificate is asked for seldom.
Status retain(const Call &call, const sa_block_lists &lists, int chunk, Retained *retained, void *base) {
  static_assert(sizeof(Retained) == 12);
  const sa_problem &p = call.params.problem;
  const Plan plan(p);
  const SelectSpace space(p, plan, chunk, base);
  return score(call, lists.first_tile, lists.tiles, plan, space, space.ones, 0, [&](const SampleParams &s) {
    RetainParams r{};
    static_cast<SampleParams &>(r) = s;
    r.counts = lists.counts;
    r.indices = lists.indices;
    r.retained = reinterpret_cast<float *>(retained);
    r.call_tiles = plan.tiles;
    return from_cuda(launch_retain(r, call.stream), "Launching the certificate kernel");
  });
}

Status filter(const Call &call, const float *mass, const sa_block_lists &lists, void *) {
  const sa_problem &p = call.params.problem;
  FilterParams f{mass, call.params.alpha, call.params.bounds, lists.counts, lists.indices, p.alpha, p.max_density, p.batch, p.heads, p.queries, p.keys,
                 lists.first_tile, lists.tiles, lists.capacity, p.block_q, p.block_k,
                 // Token counts beyond the keys mean all of them, and would overflow in the kernel.
                 std::min(p.window, p.keys), std::min(p.sink, p.keys), std::min(p.dense_rows, p.keys), nullptr};
  return from_cuda(launch_filter(f, call.stream, true), "Launching the filter kernel");
}

Status decode(const Call &call, void *base) {
  const sa_problem &p = call.params.problem;
  const DecodeParams d = decode_params(call, base);
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::decode(d, call.stream); }), "Launching the decode kernel");
}

}  // namespace

const Path &sm90_path() {
  static const Path path{SA_PATH_SM90,     "sm90",           90,          90,    false,  selects, attends, decodes, check_tensors,
                         sm90_select_need, sm90_attend_need, decode_need, begin, sample, filter,  retain,  attend,  decode};
  return path;
}

}  // namespace sample_attention

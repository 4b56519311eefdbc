// The stages and their order. Everything that is launched here is sized by the shape alone.
#include "../kernels/filtering/filter_params.h"
#include "built.h"
#include "launchers.h"
#include "plan.h"
#include "status.h"
#include "tensor_map.h"

#include <algorithm>

namespace sample_attention {
namespace {

struct Device {
  int multiprocessors = 0;
};

Status query_device(const sa_problem &problem, Device *device) {
  int id = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (error != cudaSuccess) return from_cuda(error, "Reading the current device");
  return supports(problem, 10 * major + minor);
}

Status check_tensor(const char *name, const sa_tensor &t) {
  if (t.data == nullptr) return fail(SA_INVALID, "The pointer of '%s' is null; pass device memory.", name);
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0) return fail(SA_INVALID, "'%s' starts at %p; it must be aligned to 16 bytes.", name, t.data);
  if (t.stride_b % 8 != 0 || t.stride_h % 8 != 0 || t.stride_s % 8 != 0)
    return fail(SA_INVALID, "'%s' has strides %lld, %lld, %lld (elements); each must be a multiple of 8, make the tensor contiguous.", name,
                static_cast<long long>(t.stride_b), static_cast<long long>(t.stride_h), static_cast<long long>(t.stride_s));
  if (t.stride_b < 0 || t.stride_h < 0 || t.stride_s < 0) return fail(SA_INVALID, "'%s' has a negative stride; make the tensor contiguous.", name);
  return {};
}

Status check(const sa_prefill_params &params, void *workspace, int64_t workspace_size, Device *device) {
  Status status = query_device(params.problem, device);
  if (!status.ok()) return status;
  const struct {
    const char *name;
    const sa_tensor &tensor;
  } tensors[] = {{"query", params.query}, {"key", params.key}, {"value", params.value}, {"output", params.output}};
  for (const auto &t : tensors) {
    status = check_tensor(t.name, t.tensor);
    if (!status.ok()) return status;
  }
  int64_t needed = workspace_bytes(params.problem);
  if (workspace == nullptr || workspace_size < needed)
    return fail(SA_INVALID, "The workspace has %lld bytes; this problem needs %lld (workspace_bytes).",
                static_cast<long long>(workspace == nullptr ? 0 : workspace_size), static_cast<long long>(needed));
  if (reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return fail(SA_INVALID, "The workspace starts at %p; it must be aligned to 256 bytes.", workspace);
  return {};
}

// Calls f(Launchers<dtype, head_dim>{}) for the problem's instance; supports() has checked that it is built.
template <class F>
auto dispatch(const sa_problem &problem, F f) {
#define SA_CASE(D) \
  if (problem.head_dim == D) return problem.dtype == SA_BFLOAT16 ? f(Launchers<SA_BFLOAT16, D>{}) : f(Launchers<SA_FLOAT16, D>{});
  SA_FOR_EACH_HEAD_DIM(SA_CASE)
#undef SA_CASE
  return decltype(f(Launchers<SA_FLOAT16, 0>{})){};
}

MapShape map_shape(const sa_problem &p, int heads) { return {p.dtype, p.head_dim, heads, p.batch}; }

int log2_of(int v) {
  int n = 0;
  while ((1 << n) < v) ++n;
  return n;
}

Status run_attend(const sa_prefill_params &params, const sa_block_lists *lists, const Plan &plan, const Workspace &space, int ticket, const Device &device,
                  cudaStream_t stream) {
  const sa_problem &p = params.problem;
  const int stage_keys = dispatch(p, [](auto instance) { return decltype(instance)::attend_stage_keys(); });
  const int unit = lists != nullptr ? std::min(p.block_k, stage_keys) : stage_keys;
  AttendParams a{};
  Status status = encode_rows(&a.query, params.query, map_shape(p, p.heads), p.queries, kAttendRows);
  if (status.ok()) status = encode_rows(&a.key, params.key, map_shape(p, p.kv_heads), p.keys, unit);
  if (status.ok()) status = encode_rows(&a.value, params.value, map_shape(p, p.kv_heads), p.keys, unit);
  if (status.ok()) status = encode_rows(&a.output, params.output, map_shape(p, p.heads), p.queries, 64);
  if (!status.ok()) return status;
  const int all_tiles = static_cast<int>((int64_t(p.queries) + kAttendRows - 1) / kAttendRows);
  a.ticket = space.tickets + ticket;
  a.bounds = params.bounds;
  a.lse = params.lse;
  a.batch = p.batch;
  a.heads = p.heads;
  a.kv_heads = p.kv_heads;
  a.queries = p.queries;
  a.keys = p.keys;
  a.tiles = all_tiles;
  a.tiles_per_list = plan.tiles_per_list;
  a.block_log2 = log2_of(p.block_k);
  a.unit_log2 = log2_of(unit);
  a.scale = p.scale;
  a.softcap = p.softcap;
  if (lists != nullptr) {
    a.counts = lists->counts;
    a.indices = lists->indices;
    a.capacity = lists->capacity;
    a.list_tiles = lists->tiles;
    a.first_tile = lists->first_tile * plan.tiles_per_list;
    a.tiles = std::min(lists->tiles * plan.tiles_per_list, all_tiles - a.first_tile);
    a.order = space.order;
    OrderParams order{lists->counts, space.order, p.batch, p.heads, p.kv_heads, lists->tiles, a.tiles, plan.tiles_per_list, lists->capacity};
    status = from_cuda(launch_order(order, stream), "Launching the work order");
    if (!status.ok()) return status;
  }
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::attend(a, device.multiprocessors, stream); }), "Launching the prefill kernel");
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

// The weights do not depend on the query tiles: once for a call, whatever its chunks.
Status run_weigh(const sa_prefill_params &params, const Plan &plan, const Workspace &space, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  WeightParams w{params.value.data,
                 params.value.stride_b,
                 params.value.stride_h,
                 params.value.stride_s,
                 space.weight,
                 plan.weight_row,
                 plan.key_log2,
                 p.batch,
                 p.kv_heads,
                 p.keys,
                 p.value_weight};
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::weigh(w, stream); }), "Launching the value weight kernel");
}

Status run_sample(const sa_prefill_params &params, int first_tile, int tiles, float *mass, const Plan &plan, const Workspace &space, int ticket,
                  const Device &device, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  SampleParams s{};
  Status status = slice_maps(&s.query, params.query, map_shape(p, p.heads), 1 << plan.row_log2, p.queries, kSampleRows);
  if (status.ok()) status = slice_maps(&s.key, params.key, map_shape(p, p.kv_heads), 1 << plan.key_log2, p.keys, 128);
  if (!status.ok()) return status;
  // `tile` counts its rows back from the last row of a tile. Only the call's last tile can be cut short; its rows then form a slice of their own.
  bool cut = p.policy == SA_TILE && p.queries % p.block_q != 0 && first_tile + tiles == plan.tiles;
  s.full_rows = (tiles - (cut ? 1 : 0)) << plan.tile_rows_log2;
  s.full_groups = (s.full_rows + kSampleRows - 1) / kSampleRows;
  s.groups = s.full_groups + (cut ? 1 : 0);
  s.lse = space.lse;
  s.mass = mass;
  s.weight = space.weight;
  s.weight_row = plan.weight_row;
  s.alpha = params.alpha;
  s.alpha_all = p.alpha;
  s.bounds = params.bounds;
  s.scale = p.scale;
  s.softcap = p.softcap;
  s.batch = p.batch;
  s.heads = p.heads;
  s.kv_heads = p.kv_heads;
  s.queries = p.queries;
  s.keys = p.keys;
  s.first_tile = first_tile;
  s.tiles = tiles;
  s.blocks = plan.blocks;
  s.classes = plan.classes;
  s.row_log2 = plan.row_log2;
  s.key_log2 = plan.key_log2;
  s.tile_rows_log2 = plan.tile_rows_log2;
  s.block_keys_log2 = plan.block_keys_log2;
  s.ticket = space.tickets + ticket;
  status = from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::sample_rows(s, device.multiprocessors, stream); }),
                     "Launching the row sampling kernel");
  if (!status.ok()) return status;
  s.ticket = space.tickets + ticket + 1;
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::sample_mass(s, device.multiprocessors, stream); }),
                   "Launching the block mass kernel");
}

Status run_filter(const sa_prefill_params &params, const float *mass, const sa_block_lists &lists, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  FilterParams f{mass,   params.alpha,     params.bounds, lists.counts,   lists.indices, p.alpha,   p.batch,  p.heads, p.queries,
                 p.keys, lists.first_tile, lists.tiles,   lists.capacity, p.block_q,     p.block_k, p.window, p.sink,  p.dense_rows};
  return from_cuda(launch_filter(f, stream), "Launching the filter kernel");
}

Status clear_tickets(const Workspace &space, cudaStream_t stream) {
  return from_cuda(cudaMemsetAsync(space.tickets, 0, kTickets * sizeof(int32_t), stream), "Clearing the work counters");
}

Status check_tiles(const Plan &plan, int first_tile, int tiles, int most) {
  if (first_tile < 0 || tiles < 1 || int64_t(first_tile) + tiles > plan.tiles || tiles > most)
    return fail(SA_INVALID, "first_tile %d with %d tiles; the call has %d query tiles, and one step takes 1 to %d of them.", first_tile, tiles, plan.tiles,
                most);
  return {};
}

Status check_lists(const Plan &plan, const sa_block_lists &lists) {
  if (lists.counts == nullptr || lists.indices == nullptr) return fail(SA_INVALID, "The counts or indices of the block lists are null; pass device memory.");
  if (lists.capacity < plan.blocks) return fail(SA_INVALID, "The block lists have rows of %d; at least nK = %d is needed.", lists.capacity, plan.blocks);
  return check_tiles(plan, lists.first_tile, lists.tiles, plan.tiles);
}

Status full_policy(const char *stage) {
  return fail(SA_INVALID,
              "'%s' was asked of a problem that is full attention (policy dense, alpha 1, keys below min_length, or at most 16 queries); call attend "
              "without lists.",
              stage);
}

}  // namespace

Status sample(const sa_prefill_params &params, int32_t first_tile, int32_t tiles, float *mass, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  Device device;
  Status status = check(params, workspace, workspace_size, &device);
  if (!status.ok()) return status;
  if (is_full(params.problem)) return full_policy("sample");
  if (mass == nullptr) return fail(SA_INVALID, "The pointer of 'mass' is null; pass device memory of [B, Hq, tiles, nK] floats.");
  Plan plan(params.problem);
  status = check_tiles(plan, first_tile, tiles, plan.chunk);
  if (!status.ok()) return status;
  Workspace space(params.problem, plan, workspace);
  status = clear_tickets(space, stream);
  if (status.ok()) status = run_weigh(params, plan, space, stream);
  return status.ok() ? run_sample(params, first_tile, tiles, mass, plan, space, 0, device, stream) : status;
}

Status filter(const sa_prefill_params &params, const float *mass, const sa_block_lists &lists, cudaStream_t stream) {
  Device device;
  Status status = query_device(params.problem, &device);
  if (!status.ok()) return status;
  if (is_full(params.problem)) return full_policy("filter");
  if (mass == nullptr) return fail(SA_INVALID, "The pointer of 'mass' is null; pass what sample wrote.");
  Plan plan(params.problem);
  status = check_lists(plan, lists);
  if (!status.ok()) return status;
  if (lists.capacity != plan.blocks)
    return fail(SA_INVALID, "The block lists have rows of %d; the filter writes rows of exactly nK = %d.", lists.capacity, plan.blocks);
  return run_filter(params, mass, lists, stream);
}

Status attend(const sa_prefill_params &params, const sa_block_lists *lists, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  Device device;
  Status status = check(params, workspace, workspace_size, &device);
  if (!status.ok()) return status;
  Plan plan(params.problem);
  if (lists != nullptr) {
    if (params.problem.block_q < kAttendRows)
      return fail(SA_UNSUPPORTED, "block_q is %d; the kernels are built for 128 and 256 rows a tile.", params.problem.block_q);
    status = check_lists(plan, *lists);
    if (!status.ok()) return status;
  }
  Workspace space(params.problem, plan, workspace);
  status = clear_tickets(space, stream);
  return status.ok() ? run_attend(params, lists, plan, space, 0, device, stream) : status;
}

Status decode(const sa_decode_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  Device device;
  Status status = check(params, workspace, workspace_size, &device);
  if (!status.ok()) return status;
  const sa_problem &p = params.problem;
  if (p.queries > kDecodeRows) return fail(SA_INVALID, "queries is %d; decode takes 1 to %d rows, use prefill.", p.queries, kDecodeRows);
  Plan plan(p);
  Workspace space(p, plan, workspace);
  DecodeParams d{};
  d.query = params.query.data;
  d.key = params.key.data;
  d.value = params.value.data;
  d.output = params.output.data;
  d.lse = params.lse;
  d.partial = space.partial;
  d.partial_lse = space.partial_lse;
  d.bounds = params.bounds;
  d.query_b = params.query.stride_b;
  d.query_h = params.query.stride_h;
  d.query_s = params.query.stride_s;
  d.key_b = params.key.stride_b;
  d.key_h = params.key.stride_h;
  d.key_s = params.key.stride_s;
  d.value_b = params.value.stride_b;
  d.value_h = params.value.stride_h;
  d.value_s = params.value.stride_s;
  d.output_b = params.output.stride_b;
  d.output_h = params.output.stride_h;
  d.output_s = params.output.stride_s;
  d.batch = p.batch;
  d.heads = p.heads;
  d.kv_heads = p.kv_heads;
  d.queries = p.queries;
  d.keys = p.keys;
  d.splits = plan.splits;
  d.scale = p.scale;
  d.softcap = p.softcap;
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::decode(d, stream); }), "Launching the decode kernel");
}

Status prefill(const sa_prefill_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  if (params.problem.queries >= 1 && params.problem.queries <= kDecodeRows) return decode(params, workspace, workspace_size, stream);
  if (is_full(params.problem)) return attend(params, nullptr, workspace, workspace_size, stream);
  Device device;
  Status status = check(params, workspace, workspace_size, &device);
  if (!status.ok()) return status;
  Plan plan(params.problem);
  Workspace space(params.problem, plan, workspace);
  status = run_weigh(params, plan, space, stream);
  if (!status.ok()) return status;
  for (int first = 0; first < plan.tiles; first += plan.chunk) {
    sa_block_lists lists{space.counts, space.indices, first, std::min(plan.chunk, plan.tiles - first), plan.blocks};
    status = clear_tickets(space, stream);
    if (status.ok()) status = run_sample(params, first, lists.tiles, space.mass, plan, space, 0, device, stream);
    if (status.ok()) status = run_filter(params, space.mass, lists, stream);
    if (status.ok()) status = run_attend(params, &lists, plan, space, 2, device, stream);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace sample_attention

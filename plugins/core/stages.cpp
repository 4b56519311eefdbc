#include "stages.h"

#include "../kernels/filtering/filter_params.h"
#include "contract.h"
#include "plan.h"
#include "status.h"

#include <algorithm>

namespace sample_attention {

Status takes_elements(const sa_problem &p) {
  if (p.dtype != SA_FLOAT16 && p.dtype != SA_BFLOAT16) return fail(SA_UNSUPPORTED, "float32 is not built (built: float16, bfloat16)");
  if (p.value_dim != p.head_dim) return fail(SA_UNSUPPORTED, "value_dim %d differs from head_dim %d", p.value_dim, p.head_dim);
  return {};
}

Status check_alignment(const sa_prefill_params &params, const char *path) {
  const struct {
    const char *name;
    const sa_tensor &tensor;
  } tensors[] = {{"query", params.query}, {"key", params.key}, {"value", params.value}, {"output", params.output}};
  for (const auto &[name, t] : tensors) {
    if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0)
      return fail(SA_INVALID, "'%s' starts at %p; the %s kernels need it aligned to 16 bytes. Align it, or set the path to generic.", name, t.data, path);
    if (t.stride_b % 8 != 0 || t.stride_h % 8 != 0 || t.stride_s % 8 != 0)
      return fail(SA_INVALID,
                  "'%s' has strides %lld, %lld, %lld (elements); the %s kernels need multiples of 8. Make the tensor contiguous, or set the path to generic.",
                  name, static_cast<long long>(t.stride_b), static_cast<long long>(t.stride_h), static_cast<long long>(t.stride_s), path);
  }
  return {};
}

Status fill_work(const Call &call, const sa_block_lists *lists, int stage_keys, int32_t *order, AttendWork *work) {
  const sa_prefill_params &params = call.params;
  const sa_problem &p = params.problem;
  AttendWork &a = *work;
  const int all_tiles = ceil_div(p.queries, kAttendRows);
  a.bounds = params.bounds;
  a.lse = params.lse;
  a.batch = p.batch;
  a.heads = p.heads;
  a.kv_heads = p.kv_heads;
  a.queries = p.queries;
  a.keys = p.keys;
  a.tiles = all_tiles;
  a.tiles_per_list = std::max(p.block_q / kAttendRows, 1);
  a.block_log2 = log2_of(p.block_k);
  a.unit_log2 = log2_of(lists != nullptr ? std::min(p.block_k, stage_keys) : stage_keys);
  a.scale = p.scale;
  a.softcap = p.softcap;
  if (lists == nullptr) return {};
  a.counts = lists->counts;
  a.indices = lists->indices;
  a.capacity = lists->capacity;
  a.list_tiles = lists->tiles;
  a.first_tile = lists->first_tile * a.tiles_per_list;
  a.tiles = std::min(lists->tiles * a.tiles_per_list, all_tiles - a.first_tile);
  a.order = order;
  OrderParams o{};
  o.counts = lists->counts;
  o.order = order;
  o.batch = p.batch;
  o.heads = p.heads;
  o.kv_heads = p.kv_heads;
  o.list_tiles = lists->tiles;
  o.tiles = a.tiles;
  o.tiles_per_list = a.tiles_per_list;
  o.capacity = lists->capacity;
  o.ticket = a.ticket;
  return from_cuda(launch_order(o, call.stream, call.compute_capability >= 90), "Launching the work order");
}

DecodeParams decode_params(const Call &call, void *base) {
  const sa_prefill_params &params = call.params;
  const sa_problem &p = params.problem;
  const Plan plan(p);
  const DecodeSpace space(p, plan, base);
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
  d.early = call.compute_capability >= 90;
  return d;
}

}  // namespace sample_attention

// The generic kernels: every problem of the contract, on every device of compute capability 7.5 and newer, in float32 arithmetic.
#include "../kernels/filtering/filter_params.h"
#include "../kernels/generic/generic_params.h"
#include "carver.h"
#include "contract.h"
#include "path.h"
#include "status.h"

#include <algorithm>
#include <cmath>

namespace sample_attention {
namespace {

constexpr int kTargetBlocks = 264;   // of decode: fills a large chip twice
constexpr int kSmallestRange = 256;  // keys

// Floats of the filter's shared memory: the opt-in limit of a thread block less what the compiler may want.
int most_blocks(int capability) {
  int kib = 227;  // 9.0, 10.x, 11.0
  if (capability == 75) kib = 64;
  if (capability == 80 || capability == 87) kib = 163;
  if (capability == 86 || capability == 89 || capability >= 120) kib = 99;
  return (kib - 1) * 256;
}

int stripe_step(float ratio) {
  volatile float quotient = 1.f / ratio;  // float32, then half to even
  return static_cast<int>(std::min(std::nearbyint(quotient), float(1 << 30)));
}

int slots_per_tile(const sa_problem &p) { return p.policy == SA_RESIDUE ? p.block_q / p.stride : p.sample_rows; }

int whole_slots(const sa_problem &p) {
  return p.policy == SA_COLUMN_SLASH ? ceil_div(p.queries, p.segment) * p.sample_rows : ceil_div(p.queries, stripe_step(p.sample_ratio));
}

struct SelectSpace {
  float *weight;              // [B, Hkv, T]
  float *lse;                 // [B, Hq, classes, slots]
  unsigned long long *slash;  // [B, Hq, nK]
  uint8_t *keep;              // [B, Hq, mass_rows, nK]
  int32_t *all;               // [B, Hq, mass_rows]
  int64_t bytes;

  SelectSpace(const sa_problem &p, int chunk, void *base) {
    const int64_t heads = int64_t(p.batch) * p.heads, blocks = key_blocks(p);
    const int64_t whole = per_head(p) ? mass_rows(p, 0) : 0;
    Carver carver(base);
    weight = carver.take<float>(whole == 0 && p.value_weight ? int64_t(p.batch) * p.kv_heads * p.keys : 0);
    slash = carver.take<unsigned long long>(p.policy == SA_COLUMN_SLASH ? heads * blocks : 0);
    keep = carver.take<uint8_t>(heads * whole * blocks);
    all = carver.take<int32_t>(heads * whole);
    const int64_t classes = p.policy == SA_RESIDUE ? p.stride : 1;
    lse = carver.take<float>(heads * (whole > 0 ? whole_slots(p) : classes * chunk * slots_per_tile(p)));
    bytes = carver.used();
  }
};

struct DecodeSpace {
  int splits;
  float *partial;      // [splits, B, Hq, S, Dv]
  float *partial_lse;  // [splits, B, Hq, S]

  DecodeSpace(const sa_problem &p, void *base) {
    const int64_t kv_heads = int64_t(p.batch) * p.kv_heads;
    splits = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>((kTargetBlocks + kv_heads - 1) / kv_heads, ceil_div(p.keys, kSmallestRange))));
    const int64_t rows = int64_t(p.batch) * p.heads * p.queries * splits;
    Carver carver(base);
    partial = carver.take<float>(rows * p.value_dim);
    partial_lse = carver.take<float>(rows);
  }
};

Status selects(const sa_problem &p, int capability) {
  if (!per_head(p) && key_blocks(p) > most_blocks(capability))
    return fail(SA_UNSUPPORTED, "%d keys in blocks of %d make %d blocks, at most %d fit the shared memory of this device, use a larger block_k", p.keys,
                p.block_k, key_blocks(p), most_blocks(capability));
  return {};
}

Status attends(const sa_problem &, bool, int) { return {}; }

Status decodes(const sa_problem &, int) { return {}; }

Need select_need(const sa_problem &p) {
  Need need;
  need.fixed = SelectSpace(p, 0, nullptr).bytes + kAlignment;
  need.tile = per_head(p) ? 0 : int64_t(p.batch) * p.heads * (p.policy == SA_RESIDUE ? p.block_q : p.sample_rows) * 4;
  return need;
}

int64_t attend_need(const sa_problem &) { return 0; }

int64_t decode_need(const sa_problem &p) {
  // splits * kv_heads, free of the division.
  const int64_t kv_heads = int64_t(p.batch) * p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t ranges = std::max(kv_heads, std::min<int64_t>(kTargetBlocks + kv_heads - 1, kv_heads * ceil_div(p.keys, kSmallestRange)));
  const int64_t rows = ranges * group * std::min(p.queries, kDecodeRows);
  return aligned(rows * p.value_dim * 4) + aligned(rows * 4);
}

generic::Tensor view(const sa_tensor &t) { return {t.data, t.stride_b, t.stride_h, t.stride_s}; }

generic::Inputs inputs(const Call &call) {
  const sa_prefill_params &a = call.params;
  const sa_problem &p = a.problem;
  return {view(a.query), view(a.key), view(a.value), a.bounds, a.key_mask, call.only,   p.dtype, p.batch,
          p.heads,       p.kv_heads,  p.queries,     p.keys,   p.head_dim, p.value_dim, p.scale, p.softcap};
}

generic::Samples samples(const Call &call, int first_tile, int tiles, const SelectSpace &space) {
  const sa_problem &p = call.params.problem;
  const bool whole = per_head(p);
  generic::Samples s{};
  s.policy = p.policy;
  s.classes = p.policy == SA_RESIDUE ? p.stride : 1;
  s.slots_per_tile = whole ? whole_slots(p) : slots_per_tile(p);
  s.tiles = whole ? 1 : tiles;
  s.slots = s.slots_per_tile * s.tiles;
  s.first_row = whole ? 0 : first_tile * p.block_q;
  s.row_step = p.policy == SA_TILE ? p.block_q / p.sample_rows : p.policy == SA_STRIPE_WINDOW ? stripe_step(p.sample_ratio) : 1;
  s.sample_rows = p.sample_rows;
  s.segment = p.segment;
  s.block_q = p.block_q;
  s.block_k = p.block_k;
  s.lse = space.lse;
  s.alpha = call.params.alpha;
  s.alpha_all = p.alpha;
  if (p.policy == SA_COLUMN_SLASH) {
    s.alpha_slash = call.params.alpha_slash;
    s.alpha_slash_all = p.alpha_slash;
  }
  return s;
}

Status begin(const Call &call, int chunk, void *base) {
  const sa_problem &p = call.params.problem;
  if (per_head(p) || !p.value_weight) return {};
  const generic::WeighParams w{inputs(call), SelectSpace(p, chunk, base).weight};
  return from_cuda(generic::launch_weigh(w, call.stream), "Launching the generic value weight kernel");
}

Status sample(const Call &call, int first_tile, int tiles, int chunk, float *mass, void *base) {
  const sa_problem &p = call.params.problem;
  const SelectSpace space(p, chunk, base);
  const generic::RowsParams r{inputs(call), samples(call, first_tile, tiles, space)};
  const bool slash = p.policy == SA_COLUMN_SLASH;
  if (slash) {
    const int64_t bytes = int64_t(p.batch) * p.heads * key_blocks(p) * static_cast<int64_t>(sizeof(*space.slash));
    Status status = from_cuda(cudaMemsetAsync(space.slash, 0, bytes, call.stream), "Clearing the slash masses");
    if (!status.ok()) return status;
  }
  Status status = from_cuda(generic::launch_rows(r, call.multiprocessors, call.stream), "Launching the generic row sampling kernel");
  if (!status.ok()) return status;
  generic::MassParams m{};
  m.in = r.in;
  m.sample = r.sample;
  m.weight = per_head(p) || !p.value_weight ? nullptr : space.weight;
  m.mass = mass;
  m.slash = slash ? space.slash : nullptr;
  m.mass_rows = mass_rows(p, tiles);
  m.blocks = key_blocks(p);
  status = from_cuda(generic::launch_mass(m, call.multiprocessors, call.stream), "Launching the generic block mass kernel");
  if (!status.ok() || !slash) return status;
  const generic::SlashParams s{space.slash, mass, call.only, p.batch, p.heads, key_blocks(p)};
  return from_cuda(generic::launch_slash(s, call.stream), "Launching the generic slash kernel");
}

Status filter(const Call &call, const float *mass, const sa_block_lists &lists, void *base) {
  const sa_prefill_params &a = call.params;
  const sa_problem &p = a.problem;
  const int window = std::min(forced_window(p), p.keys), sink = std::min(p.sink, p.keys), dense_rows = std::min(p.dense_rows, p.keys);
  if (!per_head(p)) {
    const FilterParams f{mass,   a.alpha,          a.bounds,    lists.counts,   lists.indices, p.alpha,   p.max_density, p.batch, p.heads,    p.queries,
                         p.keys, lists.first_tile, lists.tiles, lists.capacity, p.block_q,     p.block_k, window,        sink,    dense_rows, call.only};
    return from_cuda(launch_filter(f, call.stream), "Launching the filter kernel");
  }
  const SelectSpace space(p, 0, base);
  const int rows = mass_rows(p, 0), blocks = key_blocks(p);
  const generic::PickParams pick{mass, space.keep, space.all, a.alpha, a.alpha_slash, p.alpha, p.alpha_slash, call.only, p.batch, p.heads, rows, blocks};
  Status status = from_cuda(generic::launch_pick(pick, call.stream), "Launching the generic selection kernel");
  if (!status.ok()) return status;
  const generic::ExpandParams e{space.keep, space.all,        rows,        a.bounds, call.only, lists.counts, lists.indices, p.batch, p.heads,   p.queries,
                                p.keys,     lists.first_tile, lists.tiles, blocks,   p.block_q, p.block_k,    window,        sink,    dense_rows};
  return from_cuda(generic::launch_expand(e, call.stream), "Launching the generic list kernel");
}

Status retain(const Call &call, const sa_block_lists &lists, int chunk, Retained *retained, void *base) {
  const sa_problem &p = call.params.problem;
  const SelectSpace space(p, chunk, base);
  const generic::RetainParams r{
      inputs(call), samples(call, lists.first_tile, lists.tiles, space), lists.counts, lists.indices, retained, lists.first_tile, lists.tiles, query_tiles(p),
      key_blocks(p)};
  return from_cuda(generic::launch_retain(r, call.multiprocessors, call.stream), "Launching the generic certificate kernel");
}

generic::AttendParams attend_params(const Call &call) {
  const sa_prefill_params &a = call.params;
  generic::AttendParams g{};
  g.in = inputs(call);
  g.output = a.output.data;
  g.output_b = a.output.stride_b;
  g.output_h = a.output.stride_h;
  g.output_s = a.output.stride_s;
  g.lse = a.lse;
  g.block_q = a.problem.block_q;
  g.block_k = a.problem.block_k;
  return g;
}

Status attend(const Call &call, const sa_block_lists *lists, void *) {
  generic::AttendParams g = attend_params(call);
  if (lists != nullptr) {
    g.counts = lists->counts;
    g.indices = lists->indices;
    g.first_tile = lists->first_tile;
    g.list_tiles = lists->tiles;
    g.capacity = lists->capacity;
  }
  return from_cuda(generic::launch_attend(g, call.multiprocessors, call.stream), "Launching the generic attention kernel");
}

Status decode(const Call &call, void *base) {
  const DecodeSpace space(call.params.problem, base);
  generic::AttendParams g = attend_params(call);
  g.partial = space.partial;
  g.partial_lse = space.partial_lse;
  g.splits = space.splits;
  return from_cuda(generic::launch_decode(g, call.multiprocessors, call.stream), "Launching the generic decode kernel");
}

}  // namespace

const Path &generic_path() {
  static const Path path{SA_PATH_GENERIC, "generic",   75,    999,    true,   selects, attends, decodes, nullptr, select_need,
                         attend_need,     decode_need, begin, sample, filter, retain,  attend,  decode,  true};
  return path;
}

}  // namespace sample_attention

// The mma.sync kernels (compute capability 8.0 and newer): what they take, their workspace, and how their stages are started.
#include "../kernels/filtering/filter_params.h"
#include "built.h"
#include "carver.h"
#include "contract.h"
#include "launchers_sm80.h"
#include "plan.h"
#include "stages.h"
#include "status.h"

#include <algorithm>

namespace sample_attention {
namespace {

constexpr int kMostBlocks = 24 * 1024;               // floats of the selection in the 99 KiB of GA10x and Ada
constexpr int kPieceBlocks = 264;                    // thread blocks of the one-pass `tile` kernel: two an SM of the largest chips
constexpr int64_t kPieceBytes = int64_t(256) << 20;  // of all their pieces; when fewer than half of them fit, `tile` takes two passes

bool head_dim_built([[maybe_unused]] int head_dim) {
#define SA_CASE(D) \
  if (head_dim == D) return true;
  SA_FOR_EACH_SM80_HEAD_DIM(SA_CASE)
#undef SA_CASE
  return false;
}

// Calls f(LaunchersSm80<dtype, head_dim>{}) for the problem's instance; takes() has checked that it is built.
template <class F>
auto dispatch([[maybe_unused]] const sa_problem &p, F f) {
#define SA_CASE(D) \
  if (p.head_dim == D) return p.dtype == SA_BFLOAT16 ? f(LaunchersSm80<SA_BFLOAT16, D>{}) : f(LaunchersSm80<SA_FLOAT16, D>{});
  SA_FOR_EACH_SM80_HEAD_DIM(SA_CASE)
#undef SA_CASE
  return decltype(f(LaunchersSm80<SA_FLOAT16, 0>{})){};
}

Status takes(const sa_problem &p) {
  Status status = takes_elements(p);
  if (status.ok() && !head_dim_built(p.head_dim)) return fail(SA_UNSUPPORTED, "head_dim %d is not built (built: " SA_SM80_HEAD_DIMS_TEXT ")", p.head_dim);
  return status;
}

Status attends(const sa_problem &p, bool listed, int) {
  Status status = takes(p);
  if (status.ok() && listed && p.block_q < kAttendRows) return fail(SA_UNSUPPORTED, "block_q %d is not built (built: 128, 256)", p.block_q);
  return status;
}

Status decodes(const sa_problem &p, int) { return takes(p); }

// How rows and keys are cut into slices, and where the pieces go. Powers of two as logarithms.
struct Shape {
  int classes, row_log2, key_log2, tile_rows_log2, block_keys_log2;
  int weight_row;               // floats of one key slice in the weights
  int piece_log2, piece_count;  // keys of a piece; pieces of a thread block
  int piece_blocks;             // thread blocks that the pieces have room for
  int64_t piece_bytes;          // of all of them
  bool one_pass;

  explicit Shape(const sa_problem &p) {
    classes = p.policy == SA_RESIDUE ? p.stride : 1;
    row_log2 = log2_of(p.policy == SA_RESIDUE ? p.stride : p.block_q / p.sample_rows);
    key_log2 = p.policy == SA_RESIDUE ? row_log2 : 0;
    tile_rows_log2 = log2_of(p.block_q) - row_log2;
    block_keys_log2 = log2_of(p.block_k) - key_log2;
    weight_row = ceil_div(ceil_div(p.keys, 1 << key_log2), 128) * 128;
    piece_log2 = std::min(log2_of(p.block_k), 6);
    piece_count = ceil_div(p.keys, 128) << (7 - piece_log2);  // of whole key tiles
    const int64_t groups = int64_t(p.batch) * p.heads * (ceil_div(int64_t(query_tiles(p)) << tile_rows_log2, kSampleSm80Rows) + 1);
    const int64_t each = int64_t(piece_count) * kSampleSm80Rows * 4, wanted = std::min<int64_t>(groups, kPieceBlocks);
    // Does not fall when the problem grows, whichever kernel is chosen.
    piece_bytes = p.policy == SA_TILE ? std::min(wanted * each, kPieceBytes) : 0;
    piece_blocks = static_cast<int>(piece_bytes / each);
    one_pass = piece_blocks > 0 && 2 * piece_blocks >= wanted;
  }

  int groups(int chunk) const { return ceil_div(int64_t(chunk) << tile_rows_log2, kSampleSm80Rows) + 1; }
};

Status selects(const sa_problem &p, int) {
  Status status = takes(p);
  if (!status.ok()) return status;
  if (p.has_certificate) return fail(SA_UNSUPPORTED, "the certificate is not built");
  if (per_head(p)) return fail(SA_UNSUPPORTED, "policy %s is not built", p.policy == SA_COLUMN_SLASH ? "column_slash" : "stripe_window");
  if (p.block_q < kAttendRows) return fail(SA_UNSUPPORTED, "block_q %d is not built (built: 128, 256)", p.block_q);
  if (p.policy == SA_RESIDUE) {
    const int rows = p.block_q / p.stride, keys = p.block_k / p.stride;
    if (rows < 4 || rows > 128 || keys < 2 || keys > 128)
      return fail(SA_UNSUPPORTED,
                  "stride %d with block_q %d and block_k %d is not built (built: 4 to 128 rows of a tile in a slice, block_q / stride, and 2 to 128 keys of a "
                  "block, block_k / stride)",
                  p.stride, p.block_q, p.block_k);
  } else {
    if (p.sample_rows < 4 || p.sample_rows > 128)
      return fail(SA_UNSUPPORTED, "sample_rows %d is not built (built: 4, 8, 16, 32, 64, 128 rows a tile)", p.sample_rows);
    if (p.block_k > 128) return fail(SA_UNSUPPORTED, "block_k %d with policy tile is not built (built: at most 128)", p.block_k);
  }
  if (key_blocks(p) > kMostBlocks)
    return fail(SA_UNSUPPORTED, "%d keys in blocks of %d make %d blocks, more than the %d that fit shared memory", p.keys, p.block_k, key_blocks(p),
                kMostBlocks);
  return {};
}

Status check_tensors(const sa_prefill_params &params) { return check_alignment(params, "sm80"); }

struct SelectSpace80 {
  int32_t *ticket;
  float *weight, *pieces, *lse;
  int64_t bytes;

  SelectSpace80(const sa_problem &p, const Shape &shape, int groups, void *base) {
    Carver carver(base);
    ticket = carver.take<int32_t>(1);
    weight = carver.take<float>(int64_t(p.batch) * p.kv_heads * shape.weight_row << shape.key_log2);
    pieces = carver.take<float>(shape.piece_bytes / 4);
    lse = carver.take<float>(int64_t(p.batch) * p.heads * shape.classes * groups * kSampleSm80Rows);
    bytes = carver.used();
  }
};

Need select_need(const sa_problem &p) {
  const Shape shape(p);
  const int64_t slices = int64_t(p.batch) * p.heads * shape.classes;
  Need need;
  // The rounding of the row groups is at most two of them a slice; everything else of the log-sum-exps grows with the chunk.
  need.fixed = SelectSpace80(p, shape, 2, nullptr).bytes;
  need.tile = slices * (int64_t(4) << shape.tile_rows_log2);
  need.granule = std::max(kSampleSm80Rows >> shape.tile_rows_log2, 1);
  return need;
}

int64_t attend_need(const sa_problem &p) {
  return aligned(int64_t(p.batch) * p.heads * ceil_div(p.queries, p.block_q) * std::max(p.block_q / kAttendRows, 1) * 4);
}

// The weights do not depend on the query tiles.
Status begin(const Call &call, int chunk, void *base) {
  const sa_prefill_params &params = call.params;
  const sa_problem &p = params.problem;
  const Shape shape(p);
  const SelectSpace80 space(p, shape, shape.groups(chunk), base);
  WeightParams w{};
  w.value = params.value.data;
  w.value_b = params.value.stride_b;
  w.value_h = params.value.stride_h;
  w.value_s = params.value.stride_s;
  w.weight = space.weight;
  w.bounds = params.bounds;
  w.weight_row = shape.weight_row;
  w.key_log2 = shape.key_log2;
  w.batch = p.batch;
  w.kv_heads = p.kv_heads;
  w.keys = p.keys;
  w.by_value = p.value_weight;
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::weigh(w, call.stream); }), "Launching the value weight kernel");
}

Status sample(const Call &call, int first_tile, int tiles, int chunk, float *mass, void *base) {
  const sa_prefill_params &params = call.params;
  const sa_problem &p = params.problem;
  const Shape shape(p);
  const SelectSpace80 space(p, shape, shape.groups(chunk), base);
  SampleSm80Params s{};
  // `tile` counts its rows back from the last row of a tile. Only the call's last tile can be cut short; its rows then form a slice of their own.
  const bool cut = p.policy == SA_TILE && p.queries % p.block_q != 0 && first_tile + tiles == query_tiles(p);
  s.full_rows = (tiles - (cut ? 1 : 0)) << shape.tile_rows_log2;
  s.full_groups = ceil_div(s.full_rows, kSampleSm80Rows);
  s.groups = s.full_groups + (cut ? 1 : 0);
  s.query = params.query.data;
  s.query_b = params.query.stride_b;
  s.query_h = params.query.stride_h;
  s.query_s = params.query.stride_s;
  s.key = params.key.data;
  s.key_b = params.key.stride_b;
  s.key_h = params.key.stride_h;
  s.key_s = params.key.stride_s;
  s.weight = space.weight;
  s.lse = space.lse;
  s.pieces = space.pieces;
  s.mass = mass;
  s.alpha = params.alpha;
  s.alpha_all = p.alpha;
  s.bounds = params.bounds;
  s.ticket = space.ticket;
  s.scale = p.scale;
  s.softcap = p.softcap;
  s.weight_row = shape.weight_row;
  s.batch = p.batch;
  s.heads = p.heads;
  s.kv_heads = p.kv_heads;
  s.queries = p.queries;
  s.keys = p.keys;
  s.first_tile = first_tile;
  s.tiles = tiles;
  s.blocks = key_blocks(p);
  s.classes = shape.classes;
  s.row_log2 = shape.row_log2;
  s.key_log2 = shape.key_log2;
  s.tile_rows_log2 = shape.tile_rows_log2;
  s.block_keys_log2 = shape.block_keys_log2;
  s.piece_log2 = shape.piece_log2;
  s.piece_count = shape.piece_count;
  if (shape.one_pass) {
    Status status = from_cuda(cudaMemsetAsync(space.ticket, 0, sizeof(int32_t), call.stream), "Clearing the work counter");
    if (!status.ok()) return status;
    return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::sample_blocks(s, shape.piece_blocks, call.stream); }),
                     "Launching the block sampling kernel");
  }
  Status status = from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::sample_rows(s, call.stream); }), "Launching the row sampling kernel");
  if (!status.ok()) return status;
  return from_cuda(dispatch(p, [&](auto instance) { return decltype(instance)::sample_mass(s, call.stream); }), "Launching the block mass kernel");
}

Status filter(const Call &call, const float *mass, const sa_block_lists &lists, void *) {
  const sa_problem &p = call.params.problem;
  FilterParams f{};
  f.mass = mass;
  f.alpha = call.params.alpha;
  f.bounds = call.params.bounds;
  f.counts = lists.counts;
  f.indices = lists.indices;
  f.alpha_all = p.alpha;
  f.max_density = p.max_density;
  f.batch = p.batch;
  f.heads = p.heads;
  f.queries = p.queries;
  f.keys = p.keys;
  f.first_tile = lists.first_tile;
  f.tiles = lists.tiles;
  f.blocks = lists.capacity;
  f.block_q = p.block_q;
  f.block_k = p.block_k;
  f.window = std::min(p.window, p.keys);
  f.sink = std::min(p.sink, p.keys);
  f.dense_rows = std::min(p.dense_rows, p.keys);
  return from_cuda(launch_filter(f, call.stream), "Launching the filter kernel");
}

Status attend(const Call &call, const sa_block_lists *lists, void *base) {
  const sa_prefill_params &params = call.params;
  AttendSm80Params a{};
  const int stage_keys = dispatch(params.problem, [](auto instance) { return decltype(instance)::attend_stage_keys(); });
  Status status = fill_work(call, lists, stage_keys, static_cast<int32_t *>(base), &a);
  if (!status.ok()) return status;
  a.query = params.query.data;
  a.query_b = params.query.stride_b;
  a.query_h = params.query.stride_h;
  a.query_s = params.query.stride_s;
  a.key = params.key.data;
  a.key_b = params.key.stride_b;
  a.key_h = params.key.stride_h;
  a.key_s = params.key.stride_s;
  a.value = params.value.data;
  a.value_b = params.value.stride_b;
  a.value_h = params.value.stride_h;
  a.value_s = params.value.stride_s;
  a.output = params.output.data;
  a.output_b = params.output.stride_b;
  a.output_h = params.output.stride_h;
  a.output_s = params.output.stride_s;
  return from_cuda(dispatch(params.problem, [&](auto instance) { return decltype(instance)::attend(a, call.stream); }), "Launching the prefill kernel");
}

Status decode(const Call &call, void *base) {
  const DecodeParams d = decode_params(call, base);
  return from_cuda(dispatch(call.params.problem, [&](auto instance) { return decltype(instance)::decode(d, call.stream); }), "Launching the decode kernel");
}

}  // namespace

const Path &sm80_path() {
  static const Path path{SA_PATH_SM80, "sm80",      80,          129,   false,  selects, attends, decodes, check_tensors,
                         select_need,  attend_need, decode_need, begin, sample, filter,  nullptr, attend,  decode};
  return path;
}

}  // namespace sample_attention

#include "frame.h"

#include "carver.h"
#include "contract.h"

#include <algorithm>

namespace sample_attention {
namespace {

void widen(Need &need, const Need &other) {
  need.fixed = std::max(need.fixed, other.fixed);
  need.tile = std::max(need.tile, other.tile);
  need.granule = std::max(need.granule, other.granule);
}

// The problem at a size that no path refuses for its size: what is built for it does not depend on the device or on the lengths of one call.
sa_problem smallest(sa_problem p) {
  p.batch = 1;
  p.queries = p.keys = kDecodeRows + 1;
  return p;
}

// The largest need of the paths that could be chosen.
struct Needs {
  Need select, generic_select;
  int64_t attend = 0, generic_attend = 0, decode = 0;
  int64_t tile = 0;  // of both selections
  int granule = 1;

  explicit Needs(const sa_problem &p) {
    const Path *paths[] = {&sm90_path(), &sm80_path(), &generic_path()};
    const sa_problem small = smallest(p);
    const bool selected = p.policy != SA_DENSE;
    for (const Path *path : paths) {
      if (selected && path->selects(small, 0).ok()) widen(select, path->select_need(p));
      if (path->attends(small, false, 0).ok() || path->attends(small, true, 0).ok()) attend = std::max(attend, path->attend_need(p));
      if (path->decodes(small, 0).ok()) decode = std::max(decode, path->decode_need(p));
    }
    if (p.has_key_mask) {
      if (selected) generic_select = generic_path().select_need(p);
      generic_attend = generic_path().attend_need(p);
    }
    granule = std::max(select.granule, generic_select.granule);
    tile = select.tile + generic_select.tile;
  }
};

}  // namespace

Frame::Frame(const sa_problem &p, void *base) {
  const Needs needs(p);
  const int64_t heads = int64_t(p.batch) * p.heads;
  const int64_t blocks = key_blocks(p), tiles = query_tiles(p);
  const bool sparse = !is_full(p);
  Carver carver(base);
  bounds = carver.take<int32_t>(2 * int64_t(p.batch));
  fast_bounds = carver.take<int32_t>(2 * int64_t(p.batch));
  holes = carver.take<int32_t>(p.batch);
  alpha = carver.take<float>(p.heads);
  alpha_slash = carver.take<float>(p.heads);
  const int64_t common = carver.used();

  // Decode and prefill do not meet in one call: they share the memory behind the common part.
  attend = carver.take<char>(needs.attend);
  generic_attend = carver.take<char>(needs.generic_attend);
  if (sparse) {
    const bool whole = per_head(p);
    retained = carver.take<Retained>(p.has_certificate ? heads * tiles : 0);
    mass = carver.take<float>(whole ? heads * 2 * blocks : 0);
    const int64_t fixed = carver.used() + aligned(needs.select.fixed) + aligned(needs.generic_select.fixed);

    // Masses and lists of a tile, and what the paths keep for it.
    const int64_t tile_bytes = heads * (blocks * (whole ? 4 : 8) + 4) + needs.tile;
    const int64_t scratch = std::max(p.scratch_bytes > 0 ? p.scratch_bytes : kDefaultScratch, needs.granule * tile_bytes);
    // Chunks of one size: a last one of a few tiles would not fill the device.
    const int64_t most = std::min<int64_t>(scratch / tile_bytes / needs.granule * needs.granule, tiles);
    const int even = ceil_div(tiles, ceil_div(tiles, most));
    chunk = static_cast<int>(std::min<int64_t>(int64_t(ceil_div(even, needs.granule)) * needs.granule, most));
    select = carver.take<char>(needs.select.fixed + chunk * needs.select.tile);
    generic_select = carver.take<char>(needs.generic_select.fixed + chunk * needs.generic_select.tile);
    if (!whole) mass = carver.take<float>(heads * chunk * blocks);
    counts = carver.take<int32_t>(heads * chunk);
    indices = carver.take<int32_t>(heads * chunk * blocks);
    // The chunk's own size jumps where one more tile no longer fits; the bound does not.
    constexpr int kPieces = 8;
    bytes = fixed + std::min(scratch, (tiles + needs.granule) * tile_bytes) + kPieces * kAlignment;
  } else {
    bytes = carver.used();
  }
  Carver rows(base == nullptr ? nullptr : static_cast<char *>(base) + common);
  decode = rows.take<char>(needs.decode);
  generic_decode = rows.take<char>(p.has_key_mask ? needs.decode : 0);
  bytes = aligned(std::max(bytes, common + rows.used()));
}

int64_t workspace_bytes(const sa_problem &problem) {
  return check_contract(problem).ok() && supports(problem, 0).code == SA_OK ? Frame(problem, nullptr).bytes : 0;
}

int32_t chunk_tiles(const sa_problem &problem) {
  return check_contract(problem).ok() && supports(problem, 0).code == SA_OK && !is_full(problem) ? Frame(problem, nullptr).chunk : 0;
}

}  // namespace sample_attention

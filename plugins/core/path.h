// A path is one set of kernels behind the host API: sm90, sm80 or generic. Each stage of a call goes to the fastest path that takes it.
#pragma once

#include "../kernels/common/retained.h"
#include "sample_attention/kernels.h"

#include <cstdint>

namespace sample_attention {

// One call as a path sees it. In `params` the pointers are resolved: bounds is never null where the call has padding, alpha and alpha_slash are device arrays
// or null, key_mask is null unless the path reads masks. problem.path and the environment are not looked at any more.
struct Call {
  sa_prefill_params params;
  const int32_t *only;  // [B] or null: work on the batch items whose entry is not zero and leave the others' memory alone. Given to the generic path alone
  int multiprocessors;
  int compute_capability;
  cudaStream_t stream;
};

// Workspace of a selection. No number may fall when batch, queries or keys grow: workspace_bytes() of the largest shape serves the smaller ones.
struct Need {
  int64_t fixed = 0;  // bytes that do not depend on the chunk, alignment included
  int64_t tile = 0;   // bytes for each query tile of a chunk; block masses and lists are not counted, their owner is the frame of the call
  int granule = 1;    // chunks are a multiple of this many query tiles (a power of two), the last one of a call excepted
};

struct Path {
  int code;
  const char *name;
  int first_capability, last_capability;  // compute capabilities on which the kernels run
  bool reads_mask;                        // selection and attention take key_mask themselves; else the generic kernels answer a mask with holes after them

  // Whether the stage of this problem is built: an empty text, or what is not, as "head_dim 80 is not built (built: 64, 128)". capability 0: not known yet.
  // listed: over block lists of block_q rows, else full attention.
  Status (*selects)(const sa_problem &problem, int capability);
  Status (*attends)(const sa_problem &problem, bool listed, int capability);
  Status (*decodes)(const sa_problem &problem, int capability);
  // What the tensors must fulfil beyond the contract (alignment, strides).
  Status (*check_tensors)(const sa_prefill_params &params);

  Need (*select_need)(const sa_problem &problem);
  int64_t (*attend_need)(const sa_problem &problem);  // with and without lists
  int64_t (*decode_need)(const sa_problem &problem);

  // Once for a call, before its chunks: what does not depend on the query tiles.
  Status (*begin)(const Call &call, int chunk, void *space);
  // Masses of the tiles [first_tile, first_tile + tiles), as kernels.h says. space is that of begin().
  Status (*sample)(const Call &call, int first_tile, int tiles, int chunk, float *mass, void *space);
  Status (*filter)(const Call &call, const float *mass, const sa_block_lists &lists, void *space);
  // After sample and filter of a chunk: retained[b, head, tile of the call], Retained [B, Hq, nQ].
  Status (*retain)(const Call &call, const sa_block_lists &lists, int chunk, Retained *retained, void *space);
  // lists null: full attention.
  Status (*attend)(const Call &call, const sa_block_lists *lists, void *space);
  Status (*decode)(const Call &call, void *space);

  // decode() reads key_mask itself, without bounds: no kernel has to look at the mask before it.
  bool decode_reads_mask = false;
};

const Path &sm90_path();
const Path &sm80_path();
const Path &generic_path();

enum class Work {
  kDecode,  // at most 16 rows, full attention
  kFull,    // full attention
  kListed,  // attention over lists that the caller brings
  kSparse,  // selection, then attention over its lists
};

// What run() makes of a problem.
Work work_of(const sa_problem &problem);

// Who does what in a call. Null where the stage takes no part; both null when refused.
struct Choice {
  const Path *attend = nullptr;  // or decode
  const Path *select = nullptr;
  sa_support support{};
};

Choice choose(const sa_problem &problem, Work work, int compute_capability);

}  // namespace sample_attention

// Host API of the SampleAttention kernels. Plain structs, device pointers and a stream; nothing here synchronises, allocates device memory or uses the
// default stream, and every call can be captured in a CUDA graph. Failures come back as a Status with one sentence, never as an exception.
#pragma once

#include "sample_attention/types.h"

#include <cuda_runtime_api.h>

namespace sample_attention {

struct Status {
  int code = SA_OK;
  char text[320] = {0};
  bool ok() const { return code == SA_OK; }
};

// Whether the library computes this problem on a device of the given compute capability (90 for 9.0). Needs no device.
Status supports(const sa_problem &problem, int compute_capability);

// Whether the problem is full attention, exactly, whatever is sampled (docs/op.md, "When it is full attention"). Per-head alpha arrays are not seen here.
bool is_full(const sa_problem &problem);

// Bytes of workspace for prefill(), every stage and decode() of this problem; 0 when it is not supported. Depends on the shape alone. Align the workspace to
// 256.
int64_t workspace_bytes(const sa_problem &problem);

// Query tiles that one chunk of prefill() handles: the bound on `tiles` of sample().
int32_t chunk_tiles(const sa_problem &problem);

// The whole operator.
Status prefill(const sa_prefill_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream);

// Stage 1: mass [B, Hq, tiles, nK] float, the sampled probability inside each key block, weighted by value norms when value_weight is 1.
// Only blocks that begin at or before the last row of a tile are written. Heads whose alpha is 1 are skipped.
Status sample(const sa_prefill_params &params, int32_t first_tile, int32_t tiles, float *mass, void *workspace, int64_t workspace_size, cudaStream_t stream);

// Stage 2: block lists from the masses of the same tiles. lists.capacity is nK.
Status filter(const sa_prefill_params &params, const float *mass, const sa_block_lists &lists, cudaStream_t stream);

// Stage 3: attention over listed blocks, for the tiles that the lists describe. Without lists: full attention, for every tile.
Status attend(const sa_prefill_params &params, const sa_block_lists *lists, void *workspace, int64_t workspace_size, cudaStream_t stream);

// Full attention of at most 16 query rows against all keys.
Status decode(const sa_decode_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream);

}  // namespace sample_attention

// Host API of the SampleAttention kernels. Plain structs, device pointers and a stream; nothing here synchronises, allocates device memory or uses the
// default stream, and every call can be captured in a CUDA graph. Failures come back as a Status with one sentence, never as an exception.
//
// run() is the whole operator of docs/op.md for every shape. The stages below it are the same code, callable alone.
#pragma once

#include "sample_attention/types.h"

#include <cuda_runtime_api.h>

namespace sample_attention {

struct Status {
  int code = SA_OK;
  char text[512] = {0};
  bool ok() const { return code == SA_OK; }
};

// Whether the library computes this problem on a device of the given compute capability (90 for 9.0), with which kernels, and what kept faster ones out.
// 0 stands for a device that is not known yet: the answer is that of the fastest device that the library was built for. Needs no device.
sa_support supports(const sa_problem &problem, int compute_capability);

// "sm90", "sm80", "generic", or "none".
const char *path_name(int path);

// Whether the problem is full attention, exactly, whatever is sampled (docs/op.md, "When it is full attention"). Arrays of thresholds are not seen here.
bool is_full(const sa_problem &problem);

// Bytes of workspace for run() and every stage of this problem on any device, and of every problem that differs from it only by a smaller batch, fewer queries
// or fewer keys; 0 when it is not supported. Align the workspace to 256. Needs no device.
int64_t workspace_bytes(const sa_problem &problem);

// Query tiles that one chunk of run() handles: the bound on `tiles` of sample(). 0 where sample() takes no part (full attention, or not supported).
int32_t chunk_tiles(const sa_problem &problem);

// Rows of nK masses that sample() writes for each (b, head): `tiles` of them for residue and tile, 1 for stripe_window (the columns), 2 for column_slash
// (the columns, then the slashes). 0 for dense.
int32_t mass_rows(const sa_problem &problem, int32_t tiles);

// The whole operator: decode, full attention, or sample, filter and attend, by shape.
Status run(const sa_prefill_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream);

// Stage 1: mass [B, Hq, mass_rows, nK] float, the sampled probability inside each key block (slash: distance class), weighted by value norms when value_weight
// is 1. Only blocks that begin at or before the last row of a tile are written. Heads that are full attention are skipped, and tiles that keep all blocks for
// meeting the last dense_rows may be. For column_slash and stripe_window
// the masses are those of the whole call: first_tile is 0, tiles is nQ.
Status sample(const sa_prefill_params &params, int32_t first_tile, int32_t tiles, float *mass, void *workspace, int64_t workspace_size, cudaStream_t stream);

// Stage 2: block lists from the masses of the same tiles (column_slash, stripe_window: of the call). lists.capacity is nK.
Status filter(const sa_prefill_params &params, const float *mass, const sa_block_lists &lists, void *workspace, int64_t workspace_size, cudaStream_t stream);

// Stage 3: attention over listed blocks, for the tiles that the lists describe. Without lists: full attention, for every tile.
Status attend(const sa_prefill_params &params, const sa_block_lists *lists, void *workspace, int64_t workspace_size, cudaStream_t stream);

// Full attention of at most 16 query rows against all keys.
Status decode(const sa_decode_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream);

}  // namespace sample_attention

// What the sm90 and sm80 paths ask of a call, and pass to their kernels, alike.
#pragma once

#include "../kernels/decode/decode_params.h"
#include "../kernels/prefill/attend_params.h"
#include "path.h"

namespace sample_attention {

// 16-bit elements and Dv = D: SA_OK, or what is not built, without its subject.
Status takes_elements(const sa_problem &problem);

// Bases aligned to 16 bytes and strides that are multiples of 8 elements. path: as in "the sm90 kernels".
Status check_alignment(const sa_prefill_params &params, const char *path);

// The fields that do not depend on the architecture. stage_keys: keys of a pipeline stage; order: room for the work order of the call's tiles.
// With lists, launches the kernel that fills `order`.
Status fill_work(const Call &call, const sa_block_lists *lists, int stage_keys, int32_t *order, AttendWork *work);

// Everything of the decode kernels. space: of decode_need().
DecodeParams decode_params(const Call &call, void *space);

}  // namespace sample_attention

#include "sample_attention/c_api.h"

#include "built.h"
#include "sample_attention/kernels.h"

#include <cstdio>

namespace {

namespace sa = sample_attention;

int32_t report(const sa::Status &status, char *message, size_t size) {
  if (message != nullptr && size > 0) std::snprintf(message, size, "%s", status.text);
  return status.code;
}

int32_t missing(const char *what, char *message, size_t size) {
  if (message != nullptr && size > 0) std::snprintf(message, size, "The argument '%s' is null; pass a pointer to a filled struct.", what);
  return SA_INVALID;
}

cudaStream_t as_stream(void *stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" {

int32_t sa_abi_version(void) { return SA_ABI_VERSION; }

const char *sa_build_info(void) { return "sm_90a; head sizes " SA_HEAD_DIMS_TEXT "; float16, bfloat16"; }

int32_t sa_supports(const sa_problem *problem, int32_t compute_capability, char *message, size_t message_size) {
  if (problem == nullptr) return missing("problem", message, message_size);
  return report(sa::supports(*problem, compute_capability), message, message_size);
}

int32_t sa_is_full(const sa_problem *problem) { return problem != nullptr && sa::is_full(*problem); }

int64_t sa_workspace_bytes(const sa_problem *problem) { return problem == nullptr ? 0 : sa::workspace_bytes(*problem); }

int32_t sa_chunk_tiles(const sa_problem *problem) { return problem == nullptr ? 0 : sa::chunk_tiles(*problem); }

int32_t sa_prefill(const sa_prefill_params *params, void *workspace, int64_t workspace_size, void *stream, char *message, size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  return report(sa::prefill(*params, workspace, workspace_size, as_stream(stream)), message, message_size);
}

int32_t sa_sample(const sa_prefill_params *params, int32_t first_tile, int32_t tiles, float *mass, void *workspace, int64_t workspace_size, void *stream,
                  char *message, size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  return report(sa::sample(*params, first_tile, tiles, mass, workspace, workspace_size, as_stream(stream)), message, message_size);
}

int32_t sa_filter(const sa_prefill_params *params, const float *mass, const sa_block_lists *lists, void *stream, char *message, size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  if (lists == nullptr) return missing("lists", message, message_size);
  return report(sa::filter(*params, mass, *lists, as_stream(stream)), message, message_size);
}

int32_t sa_attend(const sa_prefill_params *params, const sa_block_lists *lists, void *workspace, int64_t workspace_size, void *stream, char *message,
                  size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  return report(sa::attend(*params, lists, workspace, workspace_size, as_stream(stream)), message, message_size);
}

int32_t sa_decode(const sa_decode_params *params, void *workspace, int64_t workspace_size, void *stream, char *message, size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  return report(sa::decode(*params, workspace, workspace_size, as_stream(stream)), message, message_size);
}

}  // extern "C"

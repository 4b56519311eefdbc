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

const char *sa_build_info(void) { return SA_BUILD_TEXT; }

int32_t sa_supports(const sa_problem *problem, int32_t compute_capability, sa_support *support) {
  if (problem == nullptr || support == nullptr) return SA_INVALID;
  *support = sa::supports(*problem, compute_capability);
  return support->code;
}

const char *sa_path_name(int32_t path) { return sa::path_name(path); }

int32_t sa_is_full(const sa_problem *problem) { return problem != nullptr && sa::is_full(*problem); }

int64_t sa_workspace_bytes(const sa_problem *problem) { return problem == nullptr ? 0 : sa::workspace_bytes(*problem); }

int32_t sa_chunk_tiles(const sa_problem *problem) { return problem == nullptr ? 0 : sa::chunk_tiles(*problem); }

int32_t sa_mass_rows(const sa_problem *problem, int32_t tiles) { return problem == nullptr ? 0 : sa::mass_rows(*problem, tiles); }

int32_t sa_run(const sa_prefill_params *params, void *workspace, int64_t workspace_size, void *stream, char *message, size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  return report(sa::run(*params, workspace, workspace_size, as_stream(stream)), message, message_size);
}

int32_t sa_sample(const sa_prefill_params *params, int32_t first_tile, int32_t tiles, float *mass, void *workspace, int64_t workspace_size, void *stream,
                  char *message, size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  return report(sa::sample(*params, first_tile, tiles, mass, workspace, workspace_size, as_stream(stream)), message, message_size);
}

int32_t sa_filter(const sa_prefill_params *params, const float *mass, const sa_block_lists *lists, void *workspace, int64_t workspace_size, void *stream,
                  char *message, size_t message_size) {
  if (params == nullptr) return missing("params", message, message_size);
  if (lists == nullptr) return missing("lists", message, message_size);
  return report(sa::filter(*params, mass, *lists, workspace, workspace_size, as_stream(stream)), message, message_size);
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

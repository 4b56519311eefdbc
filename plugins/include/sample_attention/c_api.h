/* The C door of the kernels: the host API of kernels.h with plain types. Each call returns one of the SA_ codes and, when it is not SA_OK, writes its
 * sentence into message (truncated to message_size bytes, always terminated). Streams are cudaStream_t. */
#ifndef SAMPLE_ATTENTION_C_API_H
#define SAMPLE_ATTENTION_C_API_H

#include "sample_attention/types.h"

#if defined(_WIN32)
#define SA_API __declspec(dllexport)
#else
#define SA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

SA_API int32_t sa_abi_version(void);
/* "sm_90a; head sizes 64, 96, ...": what the library was built for. */
SA_API const char *sa_build_info(void);
/* Returns support->code. compute_capability: 90 for 9.0; 0: not known yet. */
SA_API int32_t sa_supports(const sa_problem *problem, int32_t compute_capability, sa_support *support);
SA_API const char *sa_path_name(int32_t path);
SA_API int32_t sa_is_full(const sa_problem *problem);
SA_API int64_t sa_workspace_bytes(const sa_problem *problem);
SA_API int32_t sa_chunk_tiles(const sa_problem *problem);
SA_API int32_t sa_mass_rows(const sa_problem *problem, int32_t tiles);
SA_API int32_t sa_run(const sa_prefill_params *params, void *workspace, int64_t workspace_size, void *stream, char *message, size_t message_size);
SA_API int32_t sa_sample(const sa_prefill_params *params, int32_t first_tile, int32_t tiles, float *mass, void *workspace, int64_t workspace_size, void *stream,
                         char *message, size_t message_size);
SA_API int32_t sa_filter(const sa_prefill_params *params, const float *mass, const sa_block_lists *lists, void *workspace, int64_t workspace_size, void *stream,
                         char *message, size_t message_size);
SA_API int32_t sa_attend(const sa_prefill_params *params, const sa_block_lists *lists, void *workspace, int64_t workspace_size, void *stream, char *message,
                         size_t message_size);
SA_API int32_t sa_decode(const sa_decode_params *params, void *workspace, int64_t workspace_size, void *stream, char *message, size_t message_size);

#ifdef __cplusplus
}
#endif
#endif

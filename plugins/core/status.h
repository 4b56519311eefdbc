// Building a Status: one printf-style sentence.
#pragma once

#include "sample_attention/kernels.h"

#include <cstdarg>
#include <cstdio>

namespace sample_attention {

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline Status fail(int code, const char *format, ...) {
  Status status;
  status.code = code;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.text, sizeof(status.text), format, arguments);
  va_end(arguments);
  return status;
}

inline Status from_cuda(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return {};
  return fail(SA_CUDA_ERROR, "%s failed: %s.", what, cudaGetErrorString(error));
}

}  // namespace sample_attention

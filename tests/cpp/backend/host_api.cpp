// The host API of the kernels for a machine without a GPU: host pointers, null stream, double precision. It lets the plugin library be linked and its enqueue
// be called where there is no CUDA. It keeps to the contract of kernels.h: the workspace is used, and nothing beyond workspace_bytes() of it.
#include "../support/elements.h"
#include "device.h"
#include "reference.h"
#include "sample_attention/kernels.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <exception>

namespace sample_attention {
namespace {

__attribute__((format(printf, 2, 3))) Status fail(int code, const char *format, ...) {
  Status status;
  status.code = code;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.text, sizeof(status.text), format, arguments);
  va_end(arguments);
  return status;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Status check(const sa_problem &p) {
  if (p.batch < 1 || p.heads < 1 || p.kv_heads < 1 || p.queries < 1 || p.keys < 1) return fail(SA_INVALID, "An extent is below 1.");
  if (p.heads % p.kv_heads != 0) return fail(SA_INVALID, "heads is %d, which is not a multiple of kv_heads %d.", p.heads, p.kv_heads);
  if (p.queries > p.keys) return fail(SA_INVALID, "queries is %d and keys is %d; allowed: queries <= keys.", p.queries, p.keys);
  // A bound like that of the kernels, so that a refusal can be seen through the plugin.
  if (p.head_dim < 1 || p.head_dim > 512) return fail(SA_UNSUPPORTED, "head_dim %d is not built (built: 1 to 512).", p.head_dim);
  return {};
}

std::vector<double> per_head(const float *values, float one, int heads) {
  return values != nullptr ? std::vector<double>(values, values + heads) : std::vector<double>(heads, one);
}

// [B, H, rows, size] by strides.
std::vector<double> gather(const sa_tensor &t, int dtype, int64_t batch, int64_t heads, int64_t rows, int64_t size) {
  std::vector<double> out;
  out.reserve(batch * heads * rows * size);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t offset = b * t.stride_b + h * t.stride_h + r * t.stride_s;
        const auto row = elements::load(static_cast<const char *>(t.data) + offset * static_cast<int64_t>(elements::size(dtype)), dtype, size);
        out.insert(out.end(), row.begin(), row.end());
      }
  return out;
}

}  // namespace

sa_support supports(const sa_problem &problem, int) {
  sa_support out{};
  const Status status = check(problem);
  out.code = status.code;
  std::snprintf(out.text, sizeof(out.text), "%s", status.text);
  if (status.ok()) out.path = SA_PATH_GENERIC;
  if (status.ok() && !is_full(problem)) out.select_path = SA_PATH_GENERIC;
  return out;
}

const char *path_name(int path) { return path == SA_PATH_NONE ? "none" : "reference"; }

bool is_full(const sa_problem &p) {
  return p.policy == SA_DENSE || p.alpha >= 1.f || (p.policy == SA_COLUMN_SLASH && p.alpha_slash >= 1.f) || p.keys < p.min_length || p.queries <= 16;
}

// One byte a cell of the block grid.
int64_t workspace_bytes(const sa_problem &p) {
  if (!check(p).ok()) return 0;
  return ceil_div(int64_t(p.batch) * p.heads * ceil_div(p.queries, p.block_q) * ceil_div(p.keys, p.block_k), 256) * 256;
}

Status run(const sa_prefill_params &call, void *workspace, int64_t workspace_size, cudaStream_t stream) try {
  const sa_problem &p = call.problem;
  Status status = check(p);
  if (!status.ok()) return status;
  if (stream != nullptr) return fail(SA_INVALID, "The reference runs on the host: the stream must be null.");
  if (workspace == nullptr || workspace_size < workspace_bytes(p)) return fail(SA_INVALID, "The workspace is too small.");
  for (const sa_tensor *t : {&call.query, &call.key, &call.value, &call.output})
    if (t->data == nullptr) return fail(SA_INVALID, "A pointer is null.");
  if ((p.has_key_mask != 0) != (call.key_mask != nullptr) || (p.has_certificate != 0) != (call.certificate != nullptr))
    return fail(SA_INVALID, "The problem and the pointers disagree on key_mask or certificate.");
  reference::Inputs in;
  in.problem = p;
  in.alpha = per_head(call.host_alpha, p.alpha, p.heads);
  in.alpha_slash = per_head(call.host_alpha_slash, p.alpha_slash, p.heads);
  in.query = gather(call.query, p.dtype, p.batch, p.heads, p.queries, p.head_dim);
  in.key = gather(call.key, p.dtype, p.batch, p.kv_heads, p.keys, p.head_dim);
  in.value = gather(call.value, p.dtype, p.batch, p.kv_heads, p.keys, p.value_dim);
  if (call.key_mask != nullptr) in.key_mask.assign(call.key_mask, call.key_mask + int64_t(p.batch) * p.keys);
  const reference::Outputs out = reference::sample_attention(in);
  std::copy(out.kept.begin(), out.kept.end(), static_cast<uint8_t *>(workspace));
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t r = 0; r < p.queries; ++r) {
        const auto first = out.output.begin() + ((b * p.heads + h) * p.queries + r) * p.value_dim;
        const int64_t offset = b * call.output.stride_b + h * call.output.stride_h + r * call.output.stride_s;
        elements::store({first, first + p.value_dim}, p.dtype, static_cast<char *>(call.output.data) + offset * static_cast<int64_t>(elements::size(p.dtype)));
      }
  if (call.certificate != nullptr) std::copy(out.certificate.begin(), out.certificate.end(), call.certificate);
  return {};
} catch (const std::exception &error) {
  return fail(SA_INVALID, "%s", error.what());
}

namespace tensorrt {

Status current_capability(int *capability) {
  *capability = 99;
  return {};
}

}  // namespace tensorrt
}  // namespace sample_attention

// The operator and its stages: who is asked for what, in which order.
#include "../kernels/generic/prepare_params.h"
#include "contract.h"
#include "frame.h"
#include "path.h"
#include "status.h"

#include <algorithm>

namespace sample_attention {
namespace {

// A checked call: its frame, its paths, and what they are given.
struct Session {
  Frame frame;
  Choice choice;
  Call attend, select;  // for the chosen paths
  Call holes;           // for the generic path, on the batch items whose mask has holes
  bool patch_attend = false, patch_select = false;

  Session(const sa_problem &problem, void *workspace) : frame(problem, workspace) {}
};

Status check_tensor(const char *name, const sa_tensor &t, int element_bytes) {
  if (t.data == nullptr) return fail(SA_INVALID, "The pointer of '%s' is null; pass device memory.", name);
  if (reinterpret_cast<uintptr_t>(t.data) % element_bytes != 0)
    return fail(SA_INVALID, "'%s' starts at %p; it must be aligned to its element of %d bytes.", name, t.data, element_bytes);
  if (t.stride_b < 0 || t.stride_h < 0 || t.stride_s < 0) return fail(SA_INVALID, "'%s' has a negative stride; make the tensor contiguous.", name);
  return {};
}

Status check_pointers(const sa_prefill_params &params) {
  const sa_problem &p = params.problem;
  const struct {
    const char *name;
    const sa_tensor &tensor;
  } tensors[] = {{"query", params.query}, {"key", params.key}, {"value", params.value}, {"output", params.output}};
  for (const auto &[name, tensor] : tensors) {
    Status status = check_tensor(name, tensor, p.dtype == SA_FLOAT32 ? 4 : 2);
    if (!status.ok()) return status;
  }
  if (params.key_mask != nullptr && params.bounds != nullptr) return fail(SA_INVALID, "Both key_mask and bounds are given; pass one of them.");
  if ((params.key_mask != nullptr) != (p.has_key_mask == 1))
    return fail(SA_INVALID, "has_key_mask is %d and key_mask is %s; they must agree, because support and workspace depend on it.", p.has_key_mask,
                params.key_mask == nullptr ? "null" : "given");
  if ((params.certificate != nullptr) != (p.has_certificate == 1))
    return fail(SA_INVALID, "has_certificate is %d and certificate is %s; they must agree, because support and workspace depend on it.", p.has_certificate,
                params.certificate == nullptr ? "null" : "given");
  if (params.alpha != nullptr && params.host_alpha != nullptr) return fail(SA_INVALID, "Both alpha and host_alpha are given; pass one of them.");
  if (params.alpha_slash != nullptr && params.host_alpha_slash != nullptr)
    return fail(SA_INVALID, "Both alpha_slash and host_alpha_slash are given; pass one of them.");
  return {};
}

Status check_workspace(const Frame &frame, const void *workspace, int64_t size) {
  if (workspace == nullptr || size < frame.bytes)
    return fail(SA_INVALID, "The workspace has %lld bytes; this problem needs %lld (workspace_bytes).", static_cast<long long>(workspace == nullptr ? 0 : size),
                static_cast<long long>(frame.bytes));
  if (reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return fail(SA_INVALID, "The workspace starts at %p; it must be aligned to 256 bytes.", workspace);
  return {};
}

Status query_device(int *capability, int *multiprocessors) {
  int id = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, id);
  *capability = 10 * major + minor;
  return from_cuda(error, "Reading the current device");
}

Call for_path(const Call &base, bool reads_mask, const Frame &frame) {
  Call call = base;
  if (base.params.key_mask != nullptr && !reads_mask) {
    call.params.key_mask = nullptr;
    call.params.bounds = frame.fast_bounds;
  }
  return call;
}

// Checks the call and puts what every stage needs on the device: the span of the mask, the thresholds.
Status open(const sa_prefill_params &params, Work work, int64_t workspace_size, void *workspace, cudaStream_t stream, Session &session) {
  const sa_problem &p = params.problem;
  Call base{params, nullptr, 0, 0, stream};
  Status status = query_device(&base.compute_capability, &base.multiprocessors);
  if (!status.ok()) return status;
  session.choice = choose(p, work, base.compute_capability);
  if (session.choice.support.code != SA_OK) return fail(session.choice.support.code, "%s", session.choice.support.text);
  const Path *attend = session.choice.attend, *select = session.choice.select;
  status = check_pointers(params);
  if (status.ok() && attend->check_tensors != nullptr) status = attend->check_tensors(params);
  if (status.ok() && select != nullptr && select->check_tensors != nullptr) status = select->check_tensors(params);
  if (status.ok()) status = check_workspace(session.frame, workspace, workspace_size);
  if (!status.ok()) return status;

  const Frame &frame = session.frame;
  const bool attend_reads_mask = work == Work::kDecode ? attend->decode_reads_mask : attend->reads_mask;
  if (params.key_mask != nullptr && !(work == Work::kDecode && attend_reads_mask)) {
    SpanParams span{params.key_mask, frame.bounds, frame.fast_bounds, frame.holes, p.batch, p.keys};
    status = from_cuda(launch_span(span, stream), "Launching the mask kernel");
    base.params.bounds = frame.bounds;
  }
  if (status.ok() && select != nullptr && params.host_alpha != nullptr) {
    status = from_cuda(store_floats(params.host_alpha, p.heads, frame.alpha, stream), "Storing alpha");
    base.params.alpha = frame.alpha;
  }
  if (status.ok() && select != nullptr && p.policy == SA_COLUMN_SLASH && params.host_alpha_slash != nullptr) {
    status = from_cuda(store_floats(params.host_alpha_slash, p.heads, frame.alpha_slash, stream), "Storing alpha_slash");
    base.params.alpha_slash = frame.alpha_slash;
  }
  base.params.host_alpha = base.params.host_alpha_slash = nullptr;

  session.attend = for_path(base, attend_reads_mask, frame);
  session.patch_attend = params.key_mask != nullptr && !attend_reads_mask;
  if (select != nullptr) {
    session.select = for_path(base, select->reads_mask, frame);
    session.patch_select = params.key_mask != nullptr && !select->reads_mask;
  }
  session.holes = base;
  session.holes.only = frame.holes;
  return status;
}

Status begin_select(const Session &s) {
  Status status = s.choice.select->begin(s.select, s.frame.chunk, s.frame.select);
  if (status.ok() && s.patch_select) status = generic_path().begin(s.holes, s.frame.chunk, s.frame.generic_select);
  return status;
}

Status run_sample(const Session &s, int first_tile, int tiles, float *mass) {
  Status status = s.choice.select->sample(s.select, first_tile, tiles, s.frame.chunk, mass, s.frame.select);
  if (status.ok() && s.patch_select) status = generic_path().sample(s.holes, first_tile, tiles, s.frame.chunk, mass, s.frame.generic_select);
  return status;
}

Status run_filter(const Session &s, const float *mass, const sa_block_lists &lists) {
  Status status = s.choice.select->filter(s.select, mass, lists, s.frame.select);
  if (status.ok() && s.patch_select) status = generic_path().filter(s.holes, mass, lists, s.frame.generic_select);
  return status;
}

Status run_retain(const Session &s, const sa_block_lists &lists) {
  Status status = s.choice.select->retain(s.select, lists, s.frame.chunk, s.frame.retained, s.frame.select);
  if (status.ok() && s.patch_select) status = generic_path().retain(s.holes, lists, s.frame.chunk, s.frame.retained, s.frame.generic_select);
  return status;
}

Status run_attend(const Session &s, const sa_block_lists *lists) {
  Status status = s.choice.attend->attend(s.attend, lists, s.frame.attend);
  if (status.ok() && s.patch_attend) status = generic_path().attend(s.holes, lists, s.frame.generic_attend);
  return status;
}

// rows null: the heads are full attention.
Status write_certificate(const sa_prefill_params &params, const Call &call, const Retained *rows) {
  if (params.certificate == nullptr) return {};
  const sa_problem &p = params.problem;
  CertificateParams c{rows,
                      call.params.alpha,
                      p.policy == SA_COLUMN_SLASH ? call.params.alpha_slash : nullptr,
                      params.certificate,
                      p.alpha,
                      p.policy == SA_COLUMN_SLASH ? p.alpha_slash : 0.f,
                      p.batch,
                      p.heads,
                      query_tiles(p)};
  return from_cuda(launch_certificate(c, call.stream), "Launching the certificate kernel");
}

Status check_tiles(const sa_problem &p, int first_tile, int tiles, int most) {
  const int all = query_tiles(p);
  if (first_tile < 0 || tiles < 1 || int64_t(first_tile) + tiles > all || tiles > most)
    return fail(SA_INVALID, "first_tile %d with %d tiles; the call has %d query tiles, and one step takes 1 to %d of them.", first_tile, tiles, all, most);
  return {};
}

Status check_lists(const sa_problem &p, const sa_block_lists &lists) {
  if (lists.counts == nullptr || lists.indices == nullptr) return fail(SA_INVALID, "The counts or indices of the block lists are null; pass device memory.");
  if (lists.capacity < key_blocks(p)) return fail(SA_INVALID, "The block lists have rows of %d; at least nK = %d is needed.", lists.capacity, key_blocks(p));
  return check_tiles(p, lists.first_tile, lists.tiles, query_tiles(p));
}

// What the stages of a selection ask first.
Status check_stage(const sa_problem &p, const char *stage, const float *mass) {
  Status status = check_contract(p);
  if (!status.ok()) return status;
  if (is_full(p))
    return fail(SA_INVALID,
                "'%s' was asked of a problem that is full attention (policy dense, alpha 1, keys below min_length, or at most 16 queries); call run.", stage);
  if (mass == nullptr) return fail(SA_INVALID, "The pointer of 'mass' is null; pass device memory of [B, Hq, mass_rows, nK] floats.");
  return {};
}

}  // namespace

Status sample(const sa_prefill_params &params, int32_t first_tile, int32_t tiles, float *mass, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  Status status = check_stage(p, "sample", mass);
  if (!status.ok()) return status;
  Session session(p, workspace);
  // A selection of the whole head has no chunks.
  status = check_tiles(p, first_tile, tiles, per_head(p) ? query_tiles(p) : session.frame.chunk);
  if (status.ok() && per_head(p) && (first_tile != 0 || tiles != query_tiles(p)))
    return fail(SA_INVALID, "first_tile %d with %d tiles; this policy samples whole heads: pass 0 and %d.", first_tile, tiles, query_tiles(p));
  if (status.ok()) status = open(params, Work::kSparse, workspace_size, workspace, stream, session);
  if (status.ok()) status = begin_select(session);
  return status.ok() ? run_sample(session, first_tile, tiles, mass) : status;
}

Status filter(const sa_prefill_params &params, const float *mass, const sa_block_lists &lists, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  Status status = check_stage(p, "filter", mass);
  if (status.ok()) status = check_lists(p, lists);
  if (!status.ok()) return status;
  if (lists.capacity != key_blocks(p))
    return fail(SA_INVALID, "The block lists have rows of %d; the filter writes rows of exactly nK = %d.", lists.capacity, key_blocks(p));
  Session session(p, workspace);
  status = open(params, Work::kSparse, workspace_size, workspace, stream, session);
  return status.ok() ? run_filter(session, mass, lists) : status;
}

Status attend(const sa_prefill_params &params, const sa_block_lists *lists, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  Status status = check_contract(p);
  if (status.ok() && lists != nullptr) status = check_lists(p, *lists);
  if (!status.ok()) return status;
  Session session(p, workspace);
  status = open(params, lists != nullptr ? Work::kListed : Work::kFull, workspace_size, workspace, stream, session);
  return status.ok() ? run_attend(session, lists) : status;
}

Status decode(const sa_decode_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  Status status = check_contract(p);
  if (!status.ok()) return status;
  if (p.queries > kDecodeRows) return fail(SA_INVALID, "queries is %d; decode takes 1 to %d rows, use run.", p.queries, kDecodeRows);
  Session session(p, workspace);
  status = open(params, Work::kDecode, workspace_size, workspace, stream, session);
  if (status.ok()) status = session.choice.attend->decode(session.attend, session.frame.decode);
  if (status.ok() && session.patch_attend) status = generic_path().decode(session.holes, session.frame.generic_decode);
  return status.ok() ? write_certificate(params, session.attend, nullptr) : status;
}

Status run(const sa_prefill_params &params, void *workspace, int64_t workspace_size, cudaStream_t stream) {
  const sa_problem &p = params.problem;
  Status status = check_contract(p);
  if (!status.ok()) return status;
  const Work work = work_of(p);
  if (work == Work::kDecode) return decode(params, workspace, workspace_size, stream);
  Session session(p, workspace);
  status = open(params, work, workspace_size, workspace, stream, session);
  if (!status.ok()) return status;
  if (work == Work::kFull) {
    status = run_attend(session, nullptr);
    return status.ok() ? write_certificate(params, session.attend, nullptr) : status;
  }

  const Frame &frame = session.frame;
  const int all = query_tiles(p);
  status = begin_select(session);
  if (status.ok() && per_head(p)) status = run_sample(session, 0, all, frame.mass);
  for (int first = 0; first < all && status.ok(); first += frame.chunk) {
    const sa_block_lists lists{frame.counts, frame.indices, first, std::min(frame.chunk, all - first), key_blocks(p)};
    if (!per_head(p)) status = run_sample(session, first, lists.tiles, frame.mass);
    if (status.ok()) status = run_filter(session, frame.mass, lists);
    if (status.ok() && params.certificate != nullptr) status = run_retain(session, lists);
    if (status.ok()) status = run_attend(session, &lists);
  }
  return status.ok() ? write_certificate(params, session.select, frame.retained) : status;
}

}  // namespace sample_attention

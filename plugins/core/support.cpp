// Which kernels answer a problem, in sentences: what was got, what is allowed, what kept the faster ones out.
#include "contract.h"
#include "path.h"
#include "status.h"

#include <cstdarg>
#include <cstdlib>
#include <cstring>

namespace sample_attention {
namespace {

constexpr int kFirstCapability = 75;

const Path *const *paths() {
  static const Path *const all[] = {&sm90_path(), &sm80_path(), &generic_path(), nullptr};
  return all;
}

// Text that is cut at the end of its buffer.
class Writer {
 public:
  Writer(char *text, size_t size) : text_(text), size_(size) { text[0] = 0; }
#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  void add(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int written = std::vsnprintf(text_ + used_, size_ - used_, format, arguments);
    va_end(arguments);
    if (written > 0) used_ = used_ + static_cast<size_t>(written) < size_ ? used_ + static_cast<size_t>(written) : size_ - 1;
  }
  bool empty() const { return used_ == 0; }

 private:
  char *text_;
  size_t size_, used_ = 0;
};

// The path asked for by the problem or the environment; SA_PATH_AUTO when none is.
Status forced_path(const sa_problem &p, int *forced) {
  *forced = p.path;
  if (p.path < SA_PATH_AUTO || p.path > SA_PATH_GENERIC)
    return fail(SA_INVALID, "path is %d; allowed: 0 (the fastest), 1 (sm90), 2 (sm80), 3 (generic).", p.path);
  const char *named = std::getenv("SA_EXPORT_KERNEL_PATH");
  if (p.path != SA_PATH_AUTO || named == nullptr || *named == 0) return {};
  for (const Path *const *path = paths(); *path != nullptr; ++path) {
    if (std::strcmp(named, (*path)->name) == 0) {
      *forced = (*path)->code;
      return {};
    }
  }
  return fail(SA_INVALID, "SA_EXPORT_KERNEL_PATH is '%.64s'; allowed: sm90, sm80, generic, or unset it for the fastest.", named);
}

bool runs_on(const Path &path, int capability) { return capability == 0 || (capability >= path.first_capability && capability <= path.last_capability); }

enum class Stage { kSelect, kAttend, kDecode };

Status takes(const Path &path, Stage stage, const sa_problem &p, bool listed, int capability) {
  switch (stage) {
    case Stage::kSelect:
      return path.selects(p, capability);
    case Stage::kAttend:
      return path.attends(p, listed, capability);
    default:
      return path.decodes(p, capability);
  }
}

const Path *find(Stage stage, const sa_problem &p, bool listed, int capability, int forced, Writer &passed_over) {
  const Path *found = nullptr;
  char reasons[360];
  Writer why(reasons, sizeof(reasons));
  for (const Path *const *path = paths(); *path != nullptr && found == nullptr; ++path) {
    if (forced != SA_PATH_AUTO && (*path)->code != forced) continue;
    if (!runs_on(**path, capability)) {
      if (forced != SA_PATH_AUTO) why.add("they need compute capability %d.%d", (*path)->first_capability / 10, (*path)->first_capability % 10);
      continue;
    }
    Status status = takes(**path, stage, p, listed, capability);
    if (status.ok()) {
      found = *path;
    } else {
      why.add("%s%s: %s", why.empty() ? "" : "; ", (*path)->name, status.text);
    }
  }
  const char *work = stage == Stage::kSelect ? "Selection" : stage == Stage::kDecode ? "Decode" : "Attention";
  const char *gap = passed_over.empty() ? "" : " ";
  if (found != nullptr && !why.empty()) passed_over.add("%s%s runs on the %s kernels (%s).", gap, work, found->name, reasons);
  if (found == nullptr) passed_over.add("%s%s is not built for this problem (%s).", gap, work, reasons);
  return found;
}

Choice refused(const Status &status) {
  Choice choice;
  choice.support.code = status.code;
  std::snprintf(choice.support.text, sizeof(choice.support.text), "%s", status.text);
  return choice;
}

}  // namespace

const char *path_name(int path) {
  for (const Path *const *p = paths(); *p != nullptr; ++p) {
    if ((*p)->code == path) return (*p)->name;
  }
  return "none";
}

Work work_of(const sa_problem &p) { return p.queries <= kDecodeRows ? Work::kDecode : is_full(p) ? Work::kFull : Work::kSparse; }

Choice choose(const sa_problem &p, Work work, int capability) {
  Status status = check_contract(p);
  if (!status.ok()) return refused(status);
  if (capability != 0 && capability < kFirstCapability)
    return refused(fail(SA_UNSUPPORTED, "compute capability %d.%d is not built; allowed: 7.5 and newer. Run the function body on this device.", capability / 10,
                        capability % 10));
  int forced = SA_PATH_AUTO;
  status = forced_path(p, &forced);
  if (!status.ok()) return refused(status);

  Choice choice;
  Writer text(choice.support.text, sizeof(choice.support.text));
  const bool listed = work == Work::kListed || work == Work::kSparse;
  choice.attend = find(work == Work::kDecode ? Stage::kDecode : Stage::kAttend, p, listed, capability, forced, text);
  if (choice.attend != nullptr && work == Work::kSparse) {
    // A forced path that has no kernels for the selection leaves it to the generic ones.
    char unused[1];
    Writer none(unused, sizeof(unused));
    if (forced != SA_PATH_AUTO) choice.select = find(Stage::kSelect, p, listed, capability, forced, none);
    if (choice.select == nullptr) choice.select = find(Stage::kSelect, p, listed, capability, forced == SA_PATH_AUTO ? forced : SA_PATH_GENERIC, text);
  }
  if (choice.attend == nullptr || (work == Work::kSparse && choice.select == nullptr)) {
    choice.attend = choice.select = nullptr;
    choice.support.code = SA_UNSUPPORTED;
    return choice;
  }
  const bool attends_holes = work == Work::kDecode ? choice.attend->decode_reads_mask : choice.attend->reads_mask;
  if (p.has_key_mask && (!attends_holes || (choice.select != nullptr && !choice.select->reads_mask)))
    text.add("%sBatch items whose mask has holes run on the generic kernels.", text.empty() ? "" : " ");
  choice.support.path = choice.attend->code;
  choice.support.select_path = choice.select == nullptr ? SA_PATH_NONE : choice.select->code;
  return choice;
}

sa_support supports(const sa_problem &problem, int compute_capability) { return choose(problem, work_of(problem), compute_capability).support; }

}  // namespace sample_attention

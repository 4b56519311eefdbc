#include "host.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

namespace sample_attention::tensorrt {
namespace {

using nvinfer1::ILogger;
using nvinfer1::ILoggerFinder;
using nvinfer1::IPluginCreatorInterface;

// Positions in virtual tables (Itanium C++ ABI: order of declaration, two entries for a virtual destructor).
struct Tables {
  int register_creator, get_creator, deregister_creator;  // IPluginRegistry
  int find_logger, log;                                   // ILoggerFinder, ILogger
};
constexpr Tables kTables10{12, 14, 15, 0, 0};
constexpr Tables kTables11{8, 10, 11, 4, 4};

template <class Result, class... Arguments>
Result call(void *object, int position, Arguments... arguments) {
  using Function = Result (*)(void *, Arguments...);
  void *const *table = *static_cast<void *const *const *>(object);
  Function function;
  std::memcpy(&function, &table[position], sizeof(function));
  return function(object, arguments...);
}

template <class Function>
Function symbol(void *module, const char *name) {
  return reinterpret_cast<Function>(dlsym(module, name));
}

// Null for a library whose tables are not known.
const Tables *tables_of(void *module) {
  const auto version = symbol<int32_t (*)()>(module, "getInferLibVersion");
  if (version == nullptr) return nullptr;
  const int32_t v = version();
  // TensorRT-RTX counts on its own: 1.4 is 10400 and has the interfaces of TensorRT 11.
  if (v < 100000) return v >= 10400 && v < 20000 ? &kTables11 : nullptr;
  return v / 10000 == 10 ? &kTables10 : v / 10000 == 11 ? &kTables11 : nullptr;
}

bool is_tensorrt(const char *path) {
  const char *slash = std::strrchr(path, '/');
  const char *name = slash == nullptr ? path : slash + 1;
  for (const char *stem : {"libnvinfer.so", "libnvinfer_lean.so", "libnvinfer_dispatch.so", "libtensorrt_rtx.so"})
    if (std::strncmp(name, stem, std::strlen(stem)) == 0) return true;
  return false;
}

struct Module {
  void *handle;  // counted: the library stays mapped while this one may call it
  std::string path;
};

std::vector<Module> tensorrt_modules() {
  std::vector<std::string> paths;
  // The loader's lock is held in the callback: nothing may be opened there.
  dl_iterate_phdr(
      [](dl_phdr_info *info, size_t, void *data) {
        if (info->dlpi_name != nullptr && is_tensorrt(info->dlpi_name)) static_cast<std::vector<std::string> *>(data)->push_back(info->dlpi_name);
        return 0;
      },
      &paths);
  std::vector<Module> modules;
  for (const auto &path : paths)
    if (void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD)) modules.push_back({handle, path});
  return modules;
}

struct Registration {
  void *module, *registry;
  const Tables *tables;
};

struct Caller {
  ILoggerFinder *finder = nullptr;
  void *module = nullptr;  // the TensorRT that gave the finder, or that was found in the process
  const Tables *tables = nullptr;
};

// The mutex is never held across a call into TensorRT: a logger may wait for Python's lock while another thread that holds it waits here.
struct State {
  std::mutex mutex;
  std::vector<Registration> registrations;
  Caller caller;
};

// Never destroyed: TensorRT may log from the destructors of its own statics.
State &state() {
  static State &s = *new State;
  return s;
}

Caller current_caller() {
  State &s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return s.caller;
}

ILogger *find_logger(const Caller &caller) {
  if (caller.tables == nullptr) return nullptr;
  ILogger *logger = caller.finder == nullptr ? nullptr : call<ILogger *>(caller.finder, caller.tables->find_logger);
  if (logger == nullptr && caller.module != nullptr) {
    if (const auto global = symbol<ILogger *(*)()>(caller.module, "getLogger")) logger = global();
  }
  return logger;
}

}  // namespace

void register_creator(IPluginCreatorInterface &creator) noexcept try {
  State &s = state();
  const std::vector<Module> modules = tensorrt_modules();
  for (const Module &module : modules) {
    const auto get_registry = symbol<void *(*)()>(module.handle, "getPluginRegistry");
    const Tables *tables = tables_of(module.handle);
    if (get_registry == nullptr) continue;
    if (tables == nullptr) {
      std::fprintf(stderr, "[SampleAttention] %s is of a version that this library does not know: load it through that registry's loadLibrary.\n",
                   module.path.c_str());
      continue;
    }
    void *registry = get_registry();
    if (registry == nullptr) continue;
    bool registered = call<bool>(registry, tables->register_creator, &creator, "");
    std::lock_guard<std::mutex> lock(s.mutex);
    if (registered) s.registrations.push_back({module.handle, registry, tables});
    if (s.caller.module == nullptr) s.caller = {nullptr, module.handle, tables};
  }
} catch (...) {
}

void hand_over(IPluginCreatorInterface &creator) noexcept try {
  State &s = state();
  std::vector<Registration> mine;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    const auto theirs =
        std::stable_partition(s.registrations.begin(), s.registrations.end(), [&](const Registration &r) { return r.module != s.caller.module; });
    mine.assign(theirs, s.registrations.end());
    s.registrations.erase(theirs, s.registrations.end());
  }
  for (const Registration &r : mine) call<bool>(r.registry, r.tables->deregister_creator, &creator);
} catch (...) {
}

void set_logger_finder(ILoggerFinder *finder) noexcept {
  if (finder == nullptr) return;
  State &s = state();
  void *module = nullptr;
  Dl_info info{};
  // An object's first word is its virtual table, which lies in the library that made it; a program is found under no name.
  if (dladdr(*reinterpret_cast<void **>(finder), &info) != 0 && info.dli_fname != nullptr) module = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  if (module == nullptr) module = dlopen(nullptr, RTLD_NOW);
  const Tables *tables = module == nullptr ? nullptr : tables_of(module);
  std::lock_guard<std::mutex> lock(s.mutex);
  s.caller = {finder, module, tables};
}

void log(ILogger::Severity severity, const std::string &text) noexcept try {
  const Caller caller = current_caller();
  if (ILogger *logger = find_logger(caller)) {
    call<void>(logger, caller.tables->log, severity, text.c_str());
  } else if (severity <= ILogger::Severity::kWARNING) {
    std::fprintf(stderr, "[SampleAttention] %s\n", text.c_str());
  }
} catch (...) {
}

}  // namespace sample_attention::tensorrt

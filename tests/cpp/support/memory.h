// Memory where the plugin computes: the host, or with SA_DRIVER_CUDA the device. Guard bytes around a buffer show what was written outside it; where
// AddressSanitizer watches there are none, so that it sees the first byte outside.
#pragma once

#include "check.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <cuda_runtime_api.h>

namespace driver {

using Bytes = std::vector<uint8_t>;

#ifdef SA_DRIVER_CUDA
inline void cuda(cudaError_t error) {
  if (!CHECK(error == cudaSuccess)) {
    std::printf("CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}
constexpr size_t kGuard = 256;
inline uint8_t *allocate(size_t bytes) {
  void *p = nullptr;
  cuda(cudaMalloc(&p, bytes));
  return static_cast<uint8_t *>(p);
}
inline void release(uint8_t *p) { cudaFree(p); }
inline void copy(void *to, const void *from, size_t bytes) { cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }
inline void wait() { cuda(cudaDeviceSynchronize()); }
#else
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 256;
#endif
inline uint8_t *allocate(size_t bytes) {
  void *p = nullptr;
  if (posix_memalign(&p, 256, bytes == 0 ? 1 : bytes) != 0) std::abort();
  return static_cast<uint8_t *>(p);
}
inline void release(uint8_t *p) { std::free(p); }
inline void copy(void *to, const void *from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void wait() {}
#endif

class Buffer {
 public:
  Buffer(size_t bytes, uint8_t fill, size_t guard = kGuard) : bytes_(bytes), guard_(guard), memory_(allocate(guard + bytes + guard)) {
    Bytes all(guard + bytes + guard, 0x5a);
    std::fill(all.begin() + guard, all.begin() + guard + bytes, fill);
    copy(memory_, all.data(), all.size());
  }
  explicit Buffer(const Bytes &content) : Buffer(content.size(), 0, 0) { write(content); }
  ~Buffer() { release(memory_); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  void *data() const { return memory_ + guard_; }
  void write(const Bytes &content) { copy(data(), content.data(), content.size()); }
  Bytes read() const {
    Bytes out(bytes_);
    copy(out.data(), data(), bytes_);
    return out;
  }
  bool guards_hold() const {
    Bytes all(guard_ + bytes_ + guard_);
    copy(all.data(), memory_, all.size());
    for (size_t i = 0; i < guard_; ++i)
      if (all[i] != 0x5a || all[guard_ + bytes_ + i] != 0x5a) return false;
    return true;
  }

 private:
  size_t bytes_, guard_;
  uint8_t *memory_;
};

}  // namespace driver

// Cutting a workspace into aligned pieces.
#pragma once

#include <cstdint>

namespace sample_attention {

constexpr int64_t kAlignment = 256;

inline int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Hands out consecutive aligned pieces. With a null base it only counts, so size and layout cannot differ.
class Carver {
 public:
  explicit Carver(void *base) : base_(static_cast<char *>(base)) {}
  template <class T>
  T *take(int64_t count) {
    T *piece = base_ == nullptr ? nullptr : reinterpret_cast<T *>(base_ + offset_);
    offset_ += aligned(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  int64_t used() const { return offset_; }

 private:
  char *base_;
  int64_t offset_ = 0;
};

}  // namespace sample_attention

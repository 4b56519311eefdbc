// kernels/common/mma_sm80.cuh for the emulator. Fragments: PTX ISA, "mma.m16n8k16" and "ldmatrix".
#pragma once

#include "device.h"

#include <cute/numeric/numeric_types.hpp>

namespace sample_attention::sm80 {

// Addresses in shared memory are offsets from its start, as on the device.
inline uint32_t shared_address(const void *pointer) { return static_cast<uint32_t>(static_cast<const unsigned char *>(pointer) - raw); }
inline void copy_16(uint32_t target, const void *source, bool inside) {
  if (inside)
    std::memcpy(raw + target, source, 16);
  else
    std::memset(raw + target, 0, 16);
}
inline void copy_commit() {}
template <int kPending>
void copy_wait() {}
inline void load_shared(uint32_t (&r)[4], uint32_t address) { std::memcpy(r, raw + address, 16); }

inline void load_eight(uint32_t (&r)[4], uint32_t address, bool transposed) {
  uint64_t rows[32];
  std::memcpy(rows, emulator::exchange(address), sizeof(rows));
  const int lane = emulator::lane();
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      int row = transposed ? 2 * (lane % 4) + i : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + i;
      std::memcpy(&pair[i], raw + rows[8 * m + row] + 2 * column, 2);
    }
    std::memcpy(&r[m], pair, 4);
  }
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) { load_eight(r, address, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { load_eight(r, address, true); }

template <class Element>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulator::lane();
  float A[2][16], B[2][16];  // this thread's two rows of A and two columns of B
  auto both = [](uint32_t word, int i) {
    uint16_t half = uint16_t(word >> (16 * i));
    Element e;
    std::memcpy(&e, &half, 2);
    return float(e);
  };
  for (int q = 0; q < 4; ++q) {
    for (int e = 0; e < 4; ++e) {
      uint32_t word = emulator::from_lane(a[e], lane / 4 * 4 + q);
      for (int i = 0; i < 2; ++i) A[e % 2][8 * (e / 2) + 2 * q + i] = both(word, i);
    }
    for (int n = 0; n < 2; ++n) {
      uint32_t low = emulator::from_lane(b0, (2 * (lane % 4) + n) * 4 + q), high = emulator::from_lane(b1, (2 * (lane % 4) + n) * 4 + q);
      for (int i = 0; i < 2; ++i) {
        B[n][2 * q + i] = both(low, i);
        B[n][8 + 2 * q + i] = both(high, i);
      }
    }
  }
  for (int e = 0; e < 4; ++e) {
    for (int k = 0; k < 16; ++k) c[e] += A[e / 2][k] * B[e % 2][k];
  }
}

}  // namespace sample_attention::sm80

// kernels/common/gmma.cuh for the emulator: each thread computes its own elements of the warpgroup's product, in float, from shared memory.
#pragma once

#include "device.h"

#include <cute/tensor.hpp>

namespace sample_attention {

template <class Element, int kHeadDim>
struct SmemAtoms {
  static constexpr int kSlab = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kSlabs = kHeadDim / kSlab;
  using RowMajor = std::conditional_t<kSlab == 64, cute::GMMA::Layout_K_SW128_Atom<Element>, cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using Transposed = std::conditional_t<kSlab == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>, cute::GMMA::Layout_MN_SW64_Atom<Element>>;
};

template <class TensorS>
struct Operand {
  TensorS tensor;
  int warpgroup, stage;
};

template <class Mma, class TensorS>
auto operand_a(const Mma &, int warpgroup, const TensorS &shared) {
  return Operand<TensorS>{shared, warpgroup, 0};
}

template <class Mma, class TensorS>
auto operand_b(const Mma &, int warpgroup, const TensorS &shared) {
  return Operand<TensorS>{shared, warpgroup, 0};
}

template <class TensorS>
Operand<TensorS> stage_of(Operand<TensorS> operand, int stage) {
  operand.stage = stage;
  return operand;
}

template <class TensorC>
void gemm_fence(TensorC &) {}

template <int kPending>
void gemm_wait() {}

// Accumulator element i + 2 r + 4 j: row 16 (warp in warpgroup) + lane / 4 + 8 r, column 8 j + 2 (lane % 4) + i (PTX ISA, wgmma, "Matrix fragment D").
template <bool kClear, class Mma, class TensorS, class TensorB, class TensorC>
void issue_gemm(Mma &, const Operand<TensorS> &a, const Operand<TensorB> &b, TensorC &c) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  for (int e = 0; e < int(cute::size(c)); ++e) {
    int row = a.warpgroup * 64 + thread / 32 * 16 + lane / 4 + 8 * (e / 2 % 2), column = 8 * (e / 4) + 2 * (lane % 4) + e % 2;
    float sum = kClear ? 0.f : c(e);
    for (int k = 0; k < int(cute::size<1>(a.tensor)); ++k) sum += float(a.tensor(row, k, a.stage)) * float(b.tensor(column, k, b.stage));
    c(e) = sum;
  }
}

// A in registers: the fragments of a row's four threads together hold the row (PTX ISA, wgmma, "Matrix fragment A").
template <bool kClear, class Mma, class TensorA, class TensorB, class TensorC>
void issue_gemm(Mma &, const TensorA &a, const Operand<TensorB> &b, TensorC &c) {
  constexpr int kElements = decltype(cute::size(a))::value;  // 4 threads x 2 rows
  const int lane = emulator::lane(), pair = 2 * (lane % 4);
  float rows[2][2 * kElements];
  for (int e = 0; e < kElements; ++e) {
    for (int q = 0; q < 4; ++q) rows[e / 2 % 2][8 * (e / 4) + 2 * q + e % 2] = emulator::from_lane(float(a(e)), lane / 4 * 4 + q);
  }
  for (int e = 0; e < int(cute::size(c)); ++e) {
    int column = 8 * (e / 4) + pair + e % 2;
    float sum = kClear ? 0.f : c(e);
    for (int k = 0; k < 2 * kElements; ++k) sum += rows[e / 2 % 2][k] * float(b.tensor(column, k, b.stage));
    c(e) = sum;
  }
}

}  // namespace sample_attention

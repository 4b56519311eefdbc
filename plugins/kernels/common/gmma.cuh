// Shared-memory layouts and issue helpers for wgmma through CuTe.
#pragma once

#include <cute/tensor.hpp>

namespace sample_attention {

// One TMA box is kSlab columns wide: the widest swizzle that divides the head size. A tile is stored slab after slab, rows inside a slab
// contiguous, so a box of any multiple of 8 rows lands where the wgmma descriptor of the whole tile expects it.
template <class Element, int kHeadDim>
struct SmemAtoms {
  static constexpr int kSlab = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kSlabs = kHeadDim / kSlab;
  static_assert(kHeadDim % kSlab == 0, "the head size is a multiple of 32");
  using RowMajor = std::conditional_t<kSlab == 64, cute::GMMA::Layout_K_SW128_Atom<Element>, cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using Transposed = std::conditional_t<kSlab == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>, cute::GMMA::Layout_MN_SW64_Atom<Element>>;
};

// A shared-memory tensor (rows, columns, stages) as an operand of a warpgroup's product. The descriptors are uniform over a warpgroup: they are those of its
// first thread.
template <class Mma, class TensorS>
__device__ __forceinline__ auto operand_a(const Mma &mma, int warpgroup, const TensorS &shared) {
  return mma.get_slice(warpgroup * 128).partition_fragment_A(shared);
}

template <class Mma, class TensorS>
__device__ __forceinline__ auto operand_b(const Mma &mma, int warpgroup, const TensorS &shared) {
  return mma.get_slice(warpgroup * 128).partition_fragment_B(shared);
}

template <class Operand>
__device__ __forceinline__ auto stage_of(const Operand &operand, int stage) {
  return operand(cute::_, cute::_, cute::_, stage);
}

// Keeps the compiler from moving accesses of an accumulator across a wgmma that is in flight.
template <class TensorC>
__device__ __forceinline__ void gemm_fence(TensorC &c) {
  cute::warpgroup_fence_operand(c);
}

// Waits until at most kPending of the issued products are in flight.
template <int kPending>
__device__ __forceinline__ void gemm_wait() {
  cute::warpgroup_wait<kPending>();
}

// Issues C (+)= A B as one committed group of wgmma and returns without waiting.
template <bool kClear, class Mma, class TensorA, class TensorB, class TensorC>
__device__ __forceinline__ void issue_gemm(Mma &mma, const TensorA &a, const TensorB &b, TensorC &c) {
  constexpr bool kFromRegisters = !cute::is_base_of<cute::GMMA::DescriptorIterator, typename Mma::FrgTypeA>::value;
  if constexpr (kFromRegisters) cute::warpgroup_fence_operand(const_cast<TensorA &>(a));
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  if constexpr (kClear) mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(c);
  if constexpr (kFromRegisters) cute::warpgroup_fence_operand(const_cast<TensorA &>(a));
}

}  // namespace sample_attention

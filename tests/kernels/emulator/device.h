// A thread block on the CPU: every CUDA thread is a fiber, and whatever waits for other threads (warp collectives, barriers, memory barriers, copies) yields.
// Included before any kernel source. It stands in for the compiler's built-ins; the overlay headers stand in for the PTX wrappers.
//
// It checks indices, masks, reductions and the hand-over between threads (a wait that nobody answers is reported as a deadlock). Copies and matrix products
// complete at once, so it says nothing about missing waits, memory ordering or speed.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>
#include <cute/tensor.hpp>  // before the names below become macros

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kSharedBytes = 232 * 1024;

struct Warp {
  uint64_t generation = 0;
  int arrived = 0, live = 32;
  uint64_t slots[2][32];
};

struct NamedBarrier {
  uint64_t generation = 0;
  int arrived = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  NamedBarrier named[16];
  ucontext_t scheduler;
  int current = 0;
  uint64_t progress = 0;
  uint3 index;
  dim3 grid, size;
  std::function<void()> body;
};

inline Block *block = nullptr;

inline Fiber &fiber() { return block->fibers[block->current]; }
inline Warp &warp() { return block->warps[block->current / 32]; }
inline int lane() { return block->current % 32; }
inline void yield() { swapcontext(&fiber().context, &block->scheduler); }

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  ++block->progress;
}

inline void entry() {
  block->body();
  fiber().done = true;
  ++block->progress;
  swapcontext(&fiber().context, &block->scheduler);
}

// Every lane of the warp brings a value; returns the values of all. Kernels here use whole warps only.
inline const uint64_t *exchange(uint64_t value) {
  Warp &w = warp();
  uint64_t generation = w.generation;
  w.slots[generation & 1][lane()] = value;
  ++block->progress;
  if (++w.arrived == 32) {
    w.arrived = 0;
    ++w.generation;
  } else {
    wait_until([&] { return w.generation != generation; });
  }
  return w.slots[generation & 1];
}

template <class T>
T from_lane(T value, int source) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  uint64_t other = exchange(bits)[source & 31];
  std::memcpy(&value, &other, sizeof(T));
  return value;
}

inline void named_arrive(int id, int threads) {
  NamedBarrier &b = block->named[id];
  ++block->progress;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
  } else if (b.arrived > threads) {
    std::fprintf(stderr, "emulator: too many arrivals at named barrier %d\n", id);
    std::abort();
  }
}

inline void named_sync(int id, int threads) {
  uint64_t generation = block->named[id].generation;
  named_arrive(id, threads);
  wait_until([&] { return block->named[id].generation != generation; });
}

inline void run_block(dim3 grid, uint3 index, int threads, const std::function<void()> &body) {
  Block b;
  block = &b;
  b.grid = grid;
  b.index = index;
  b.size = dim3(threads);
  b.body = body;
  b.fibers.resize(threads);
  b.warps.resize((threads + 31) / 32);
  for (int t = 0; t < threads; ++t) {
    Fiber &f = b.fibers[t];
    f.thread = {static_cast<unsigned>(t), 0, 0};
    f.stack.reset(new char[kStackBytes]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  int left = threads;
  while (left > 0) {
    uint64_t before = b.progress;
    left = 0;
    for (int t = 0; t < threads; ++t) {
      if (b.fibers[t].done) continue;
      b.current = t;
      swapcontext(&b.scheduler, &b.fibers[t].context);
      if (!b.fibers[t].done) ++left;
    }
    if (left > 0 && b.progress == before) {
      std::fprintf(stderr, "emulator: deadlock, %d threads wait for each other\n", left);
      std::abort();
    }
  }
  block = nullptr;
}

}  // namespace emulator

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define threadIdx (emulator::fiber().thread)
#define blockIdx (emulator::block->index)
#define gridDim (emulator::block->grid)
#define blockDim (emulator::block->size)

inline void __syncthreads() { emulator::named_sync(0, static_cast<int>(emulator::block->fibers.size())); }
inline void __syncwarp() { emulator::exchange(0); }
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulator::from_lane(v, emulator::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int delta) {
  return emulator::from_lane(v, emulator::lane() >= delta ? emulator::lane() - delta : emulator::lane());
}
template <class T>
T __shfl_sync(unsigned, T v, int source) {
  return emulator::from_lane(v, source);
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const uint64_t *votes = emulator::exchange(flag);
  unsigned out = 0;
  for (int l = 0; l < 32; ++l) out |= votes[l] ? 1u << l : 0u;
  return out;
}
inline bool __any_sync(unsigned mask, bool flag) { return __ballot_sync(mask, flag) != 0; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float __uint_as_float(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float __fdividef(float a, float b) { return a / b; }
inline int atomicAdd(int32_t *p, int v) {
  int old = *p;
  *p += v;
  return old;
}
inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long v) {
  unsigned long long old = *p;
  *p += v;
  return old;
}
using std::isinf;
using std::isnan;
using std::max;
using std::min;
#define __shared__ static  // thread blocks run one after the other

namespace sample_attention {
alignas(1024) inline unsigned char raw[emulator::kSharedBytes];
}

// kernels/common/ptx.cuh for the emulator: the same names, done at once on ordinary memory.
#pragma once

#include "device.h"

namespace emulator {

// What encode_* of core/tensor_map.cpp asked for, kept inside the opaque map.
struct Map {
  char *base;
  uint64_t dims[5], strides[4];
  uint32_t box[5];
  int32_t rank, swizzle_mask, unused;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

struct MemoryBarrier {
  int32_t bytes;
  uint32_t pending : 15, arrivals : 15, phase : 1, ready : 1;
};
static_assert(sizeof(MemoryBarrier) == 8);

inline MemoryBarrier &as_barrier(uint64_t *b) { return *reinterpret_cast<MemoryBarrier *>(b); }

inline void settle(MemoryBarrier &b) {
  ++block->progress;
  if (b.pending == 0 && b.bytes == 0) {
    b.pending = b.arrivals;
    b.phase ^= 1;
  }
}

// Copies a box between a tensor and shared memory; outside the tensor it reads zeros and writes nothing.
inline uint32_t copy_box(const CUtensorMap *opaque, void *shared, const int *origin, bool load) {
  Map map;
  std::memcpy(&map, opaque, sizeof(map));
  uint32_t rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  const uint32_t row_bytes = map.box[0] * 2;
  for (uint32_t r = 0; r < rows; ++r) {
    uint32_t rest = r;
    int64_t offset = 0;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      int64_t at = int64_t(origin[d]) + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && at >= 0 && at < int64_t(map.dims[d]);
      offset += at * int64_t(map.strides[d - 1]);
    }
    for (uint32_t c = 0; c < map.box[0]; ++c) {
      bool here = inside && origin[0] + int64_t(c) < int64_t(map.dims[0]);
      uintptr_t address = reinterpret_cast<uintptr_t>(shared) + r * row_bytes + c * 2;
      address ^= ((address >> 7) & map.swizzle_mask) << 4;
      char *tensor = map.base + offset + (origin[0] + int64_t(c)) * 2;
      if (load) {
        uint16_t v = 0;
        if (here) std::memcpy(&v, tensor, 2);
        std::memcpy(reinterpret_cast<void *>(address), &v, 2);
      } else if (here) {
        std::memcpy(tensor, reinterpret_cast<void *>(address), 2);
      }
    }
  }
  return rows * row_bytes;
}

}  // namespace emulator

namespace sample_attention::ptx {

inline void barrier_init(uint64_t *barrier, uint32_t arrivals) { emulator::as_barrier(barrier) = {0, arrivals, arrivals, 0, 1}; }
inline void fence_barrier_init() {}
inline void barrier_arrive(uint64_t *barrier) {
  auto &b = emulator::as_barrier(barrier);
  if (b.pending == 0) {
    std::fprintf(stderr, "emulator: one arrival too many\n");
    std::abort();
  }
  --b.pending;
  emulator::settle(b);
}
inline void barrier_arrive_expect(uint64_t *barrier, uint32_t bytes) {
  emulator::as_barrier(barrier).bytes += int32_t(bytes);
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t *barrier, uint32_t parity) {
  emulator::wait_until([&] { return emulator::as_barrier(barrier).phase != parity; });
}
inline void prefetch_map(const CUtensorMap *) {}
inline void landed(uint64_t *barrier, uint32_t bytes) {
  emulator::as_barrier(barrier).bytes -= int32_t(bytes);
  emulator::settle(emulator::as_barrier(barrier));
}
inline void load_4d(const CUtensorMap *map, uint64_t *barrier, void *target, int c0, int c1, int c2, int c3) {
  const int origin[] = {c0, c1, c2, c3};
  landed(barrier, emulator::copy_box(map, target, origin, true));
}
inline void load_5d(const CUtensorMap *map, uint64_t *barrier, void *target, int c0, int c1, int c2, int c3, int c4) {
  const int origin[] = {c0, c1, c2, c3, c4};
  landed(barrier, emulator::copy_box(map, target, origin, true));
}
inline void store_4d(const CUtensorMap *map, const void *source, int c0, int c1, int c2, int c3) {
  const int origin[] = {c0, c1, c2, c3};
  emulator::copy_box(map, const_cast<void *>(source), origin, false);
}
inline void store_commit() {}
inline void store_wait_read() {}
inline void store_wait() {}
inline void fence_async_proxy() {}
inline void named_sync(int id, int threads) { emulator::named_sync(id, threads); }
inline void named_arrive(int id, int threads) { emulator::named_arrive(id, threads); }
template <int kRegisters>
void registers_decrease() {}
template <int kRegisters>
void registers_increase() {}
inline void launch_dependents() {}
inline void wait_for_primary() {}
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace sample_attention::ptx

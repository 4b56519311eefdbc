// float16, bfloat16 and float32 on the host, by dtype code.
#pragma once

#include "sample_attention/types.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace elements {

inline size_t size(int dtype) { return dtype == SA_FLOAT32 ? 4 : 2; }

inline double from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return h >> 15 != 0 ? -magnitude : magnitude;
}

// Nearest, ties to even.
inline uint16_t to_half(double v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return sign | 0x7e00;
  const double a = std::fabs(v);
  if (a >= 65520) return sign | 0x7c00;
  const int exponent = a < std::ldexp(1, -14) ? -14 : std::ilogb(a);
  // A fraction that rounds up to 2048 carries into the exponent by itself.
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(a, 10 - exponent)));
  return static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(exponent + 14) << 10)));
}

inline double from_bfloat(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline uint16_t to_bfloat(double d) {
  const auto v = static_cast<float>(d);
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (std::isnan(v)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::vector<double> load(const void *data, int dtype, size_t count) {
  std::vector<double> out(count);
  for (size_t i = 0; i < count; ++i) {
    if (dtype == SA_FLOAT32) {
      float v;
      std::memcpy(&v, static_cast<const char *>(data) + 4 * i, 4);
      out[i] = v;
    } else {
      uint16_t v;
      std::memcpy(&v, static_cast<const char *>(data) + 2 * i, 2);
      out[i] = dtype == SA_FLOAT16 ? from_half(v) : from_bfloat(v);
    }
  }
  return out;
}

inline void store(const std::vector<double> &values, int dtype, void *data) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == SA_FLOAT32) {
      const auto v = static_cast<float>(values[i]);
      std::memcpy(static_cast<char *>(data) + 4 * i, &v, 4);
    } else {
      const uint16_t v = dtype == SA_FLOAT16 ? to_half(values[i]) : to_bfloat(values[i]);
      std::memcpy(static_cast<char *>(data) + 2 * i, &v, 2);
    }
  }
}

}  // namespace elements

// Stands in for CUDA's header: IEEE half precision, rounded to nearest even, with subnormals.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const unsigned sign = (unsigned)(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  // inf and NaN
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // As a float the same bits mean a number smaller by 2^112, also where it is subnormal.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7fff};
  if (rest >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // 65520 and more rounds to inf
  if (rest < 0x38800000) {
    // Subnormal, below 2^-14: adding 0.5 lets the addition round at the right bit, 2^-24.
    const unsigned rounded = __float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000;
    return {(uint16_t)(sign | rounded)};
  }
  return {(uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

// Weights in panels: the layout that products of few rows read from front to back, once.
//
// A weight [columns, inner] is divided into panels of 32 columns. A panel is a list of steps along the
// inner dimension, of 32 lanes each, one lane for a column. A lane of 32 bits holds one fp32 number, two
// neighbouring bf16 numbers (low half first) or four int8 numbers, of which the middle two have changed
// places; a lane of 16 bits one fp16 number. So a vector of lanes becomes vectors of numbers, or of
// neighbouring pairs of them, by shifts and masks alone, and the layout is the same for every instruction
// set. Columns and numbers that a weight does not have are zero.
//
// An int8 number is value / scale of its column, scale = largest absolute value / 127.
#pragma once

#include "matrix.h"
#include "ops.h"

namespace LLAMA2RT_ISA {

constexpr int64_t PANEL_COLUMNS = 32;
constexpr int PANEL_VECTORS = PANEL_COLUMNS / W;

// NUMBERS of a step in each column; `number(step, v, i)`: number i of the W columns of vector v. READY:
// it costs so little that it is done again for every few rows.
struct Fp32Panel {
  typedef float Lane;
  static constexpr int NUMBERS = 1;
  static constexpr bool READY = true;
  static f32v number(const float* step, int v, int) { return load(step + v * W); }
};

struct Fp16Panel {
  typedef f16 Lane;
  static constexpr int NUMBERS = 1;
  static constexpr bool READY = false;
  static f32v number(const f16* step, int v, int) { return load(step + v * W); }
};

struct Bf16Panel {
  typedef uint32_t Lane;
  static constexpr int NUMBERS = 2;
  static constexpr bool READY = false;
  static f32v number(const uint32_t* step, int v, int i) {
    u32v pairs;
    memcpy(&pairs, step + v * W, sizeof pairs);
    return (f32v)(i == 0 ? pairs << 16 : pairs & 0xffff0000);
  }
};

// The pairs as the processor multiplies them (matrix.h): of x, too, two neighbours are one unit.
struct Bf16PairPanel {
  typedef uint32_t Lane;
  static constexpr int NUMBERS = 1;
  static constexpr bool READY = true;
  static f32v number(const uint32_t* step, int v, int) {
    f32v pairs;
    memcpy(&pairs, step + v * W, sizeof pairs);
    return pairs;
  }
};

// int8 numbers as fp32 ones. Moved to the top of its lane such a number keeps its sign and is 2^24 times
// itself.
struct Int8Panel {
  typedef uint32_t Lane;
  static constexpr int NUMBERS = 4;
  static constexpr bool READY = false;
  static constexpr float SCALE = 0x1p-24f;
  static f32v number(const uint32_t* step, int v, int i) {
    const int byte = i == 1 ? 2 : i == 2 ? 1 : i;
    u32v lanes;
    memcpy(&lanes, step + v * W, sizeof lanes);
    if (byte < 3) lanes <<= 24 - 8 * byte;
    if (byte > 0) lanes &= 0xff000000;
    return __builtin_convertvector((i32v)lanes, f32v);
  }
};

// int8 numbers as pairs of 16 bits: the even bytes of a lane are its first pair, the odd ones its second.
struct Int8PairPanel {
  typedef uint32_t Lane;
  static constexpr int NUMBERS = 2;
  static constexpr bool READY = true;
  static f32v number(const uint32_t* step, int v, int i) {
    typedef int16_t halves __attribute__((vector_size(4 * W)));
    halves lanes;
    memcpy(&lanes, step + v * W, sizeof lanes);
    if (i == 0) lanes <<= 8;
    return (f32v)(lanes >> 8);
  }
};

// The largest absolute value of a row; NaNs do not count.
template <typename T>
inline float largest(const T* row, int64_t n) {
  f32v most = {};
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const f32v v = load(row + i, lanes), positive = v < 0.0f ? -v : v;
    most = positive > most ? positive : most;
  });
  float lanes[W], result = 0;
  store(lanes, most);
  for (float lane : lanes) result = maximum(result, lane);
  return result;
}

// The nearest integers of numbers below 2^22: adding 1.5 * 2^23 leaves them in the low bits of the
// mantissa.
inline i32v nearest(f32v x) {
  const f32v magic = broadcast(12582912.0f);
  return (i32v)(x + magic) - (i32v)magic;
}

// a * b + c, rounded once on every processor that can. Compilers fuse what is written as two operations
// in some copies of a loop and not in others, and a row's bits would hang on which one it meets.
inline f32v fused(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__SSE2__)
  return a * b + c;  // there is nothing to fuse with
#else
  f32v result;
  for (int i = 0; i < W; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#endif
}

// How units of 32 bits are multiplied and summed: a unit is UNIT numbers, a chain LENGTH. `add`: a sum, of
// numbers of x of that scale, to fp32 ones.
template <int64_t SIZE>
struct Floats {  // one fp32 number, or a pair of bf16
  typedef f32v Sum;
  static constexpr int64_t UNIT = SIZE, LENGTH = SIZE * CHAIN;
  static constexpr bool SCALED = false;
  static f32v multiply_add(f32v a, f32v b, f32v sum) {
    return LLAMA2RT_ISA::multiply_add<UNIT>(a, b, sum);
  }
  static f32v add(f32v before, f32v sum, const float*) { return before + sum; }
};

struct Int16Pairs {  // sums are int32, and exact
  typedef i32v Sum;
  static constexpr int64_t UNIT = 2, LENGTH = CHAIN;
  static constexpr bool SCALED = true;
  static i32v multiply_add(f32v a, f32v b, i32v sum) {
#if defined(__AVX512VNNI__)
    return (i32v)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return (i32v)_mm512_madd_epi16((__m512i)a, (__m512i)b) + sum;
#elif defined(__AVX2__)
    return (i32v)_mm256_madd_epi16((__m256i)a, (__m256i)b) + sum;
#elif defined(__SSE2__)
    return (i32v)_mm_madd_epi16((__m128i)a, (__m128i)b) + sum;
#else
    const i32v x = (i32v)a, y = (i32v)b;
    return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16) + sum;
#endif
  }
  static f32v add(f32v before, i32v sum, const float* scale) {
    return fused(__builtin_convertvector(sum, f32v), repeat(scale), before);
  }
};

inline int64_t numbers_of(Storage storage) {
  return storage == Storage::int8 ? 4 : storage == Storage::bf16 ? 2 : 1;
}
inline int64_t lane_bytes(Storage storage) { return storage == Storage::fp16 ? 2 : 4; }
inline int64_t steps_of(const PackedWeight& weight) {
  const int64_t numbers = numbers_of(weight.storage);
  return (weight.inner + numbers - 1) / numbers;
}

}  // namespace LLAMA2RT_ISA

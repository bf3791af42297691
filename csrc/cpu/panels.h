// Weights in panels: the layout that products of few rows read from front to back, once.
//
// A weight [columns, inner] is divided into panels of 32 columns. A panel is a list of steps along the
// inner dimension, of 32 lanes each, one lane for a column. A lane of 32 bits holds one fp32 number, two
// neighbouring bf16 numbers (low half first) or four int8 numbers; a lane of 16 bits one fp16 number. So
// a vector of lanes becomes vectors of numbers by shifts and masks alone, and the layout is the same for
// every instruction set. Columns and numbers that a weight does not have are zero.
//
// An int8 number is value / scale of its column, scale = largest absolute value / 127.
#pragma once

#include "matrix.h"
#include "ops.h"

namespace LLAMA2RT_ISA {

constexpr int64_t PANEL_COLUMNS = 32;
constexpr int PANEL_VECTORS = PANEL_COLUMNS / W;

// NUMBERS of a step in each column; `number(step, v, i)`: number i of the W columns of vector v.
struct Fp32Panel {
  typedef float Lane;
  static constexpr int NUMBERS = 1;
  static f32v number(const float* step, int v, int) { return load(step + v * W); }
};

struct Fp16Panel {
  typedef f16 Lane;
  static constexpr int NUMBERS = 1;
  static f32v number(const f16* step, int v, int) { return load(step + v * W); }
};

struct Bf16Panel {
  typedef uint32_t Lane;
  static constexpr int NUMBERS = 2;
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
  static f32v number(const uint32_t* step, int v, int) {
    f32v pairs;
    memcpy(&pairs, step + v * W, sizeof pairs);
    return pairs;
  }
};

// Moved to the top of its lane an int8 number keeps its sign and is 2^24 times itself.
constexpr float INT8_SCALE = 0x1p-24f;

struct Int8Panel {
  typedef uint32_t Lane;
  static constexpr int NUMBERS = 4;
  static f32v number(const uint32_t* step, int v, int i) {
    u32v lanes;
    memcpy(&lanes, step + v * W, sizeof lanes);
    if (i < 3) lanes <<= 24 - 8 * i;
    if (i > 0) lanes &= 0xff000000;
    return __builtin_convertvector((i32v)lanes, f32v);
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

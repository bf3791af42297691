// Products of small matrices that lie packed in scratch memory, and the packing.
//
// The sum of a product runs over units of 32 bits: one fp32 number or, where the processor
// multiplies them in pairs, two neighbouring bf16 numbers. What an instruction set cannot multiply
// in its own type becomes fp32 on packing. Scratch memory is float, whatever its units hold.
//
// A product's result stays in registers, BLOCK rows of PANEL columns, while the sum runs; sizes are
// padded with zeros to whole blocks, so there is no code for remainders beyond a half panel.
#pragma once

#include "vec.h"

namespace LLAMA2RT_ISA {

constexpr int64_t BLOCK = W == 16 ? 8 : 4;  // half of the registers hold BLOCK * PANEL sums
constexpr int64_t PANEL = 2 * W;
constexpr int64_t CHAIN = 128;

// Numbers per unit.
template <typename T>
constexpr int64_t unit() {
#if defined(__AVX512BF16__)
  return is_bf16(T{}) ? 2 : 1;
#else
  return 1;
#endif
}

template <int64_t UNIT>
inline f32v multiply_add(f32v a, f32v b, f32v sum) {
#if defined(__AVX512BF16__)
  if (UNIT == 2) return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
#if defined(__SSE2__) && !defined(__FMA__)
  // Rounding each product before it is added would lose up to twice what a fused addition loses.
  typedef double wide __attribute__((vector_size(8 * W)));
  const wide product = __builtin_convertvector(a, wide) * __builtin_convertvector(b, wide);
  return __builtin_convertvector(product + __builtin_convertvector(sum, wide), f32v);
#else
  return a * b + sum;
#endif
}

// The bits of a unit in every lane; a pair of bf16, taken for a number, could be a NaN that
// arithmetic alters.
inline f32v repeat(const float* unit) {
  int32_t bits;
  memcpy(&bits, unit, sizeof bits);
  return (f32v)(bits + i32v{});
}

// The left matrix of a product, [rows, units].
struct ByRow {
  const float* data;
  int64_t stride;
  const float* at(int64_t row, int64_t unit) const { return data + row * stride + unit; }
};
struct ByColumn {
  const float* data;
  int64_t stride;
  const float* at(int64_t row, int64_t unit) const { return data + unit * stride + row; }
};

template <int VECTORS>
using Sums = f32v[BLOCK][VECTORS];

// BLOCK rows and VECTORS * W columns of a b, over so many units.
template <int64_t UNIT, int VECTORS, typename Left>
inline void multiply(int64_t units, Left a, const float* b, int64_t b_stride, Sums<VECTORS>& sums) {
#pragma GCC unroll 8
  for (int i = 0; i < BLOCK; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = f32v{};
  for (int64_t u = 0; u < units; ++u) {
    f32v right[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) right[j] = load(b + u * b_stride + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i) {
      const f32v left = repeat(a.at(i, u));
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = multiply_add<UNIT>(left, right[j], sums[i][j]);
    }
  }
}

// The same, handed over in registers: `finish(sums)`. In fp32 a sum longer than CHAIN is made of
// shorter ones, which loses less to rounding.
template <int64_t UNIT, int VECTORS, typename Left, typename Finish>
inline void product(int64_t units, Left a, const float* b, int64_t b_stride, Finish finish) {
  Sums<VECTORS> sums;
  if (UNIT > 1 || units <= CHAIN) {
    multiply<UNIT, VECTORS>(units, a, b, b_stride, sums);
    finish(sums);
    return;
  }
  Sums<VECTORS> total = {};
  for (int64_t begin = 0; begin < units; begin += CHAIN) {
    const int64_t count = begin + CHAIN < units ? CHAIN : units - begin;
    multiply<UNIT, VECTORS>(count, Left{a.at(0, begin), a.stride}, b + begin * b_stride, b_stride,
                            sums);
    for (int i = 0; i < BLOCK; ++i)
      for (int j = 0; j < VECTORS; ++j) total[i][j] += sums[i][j];
  }
  finish(total);
}

struct Keep {
  f32v operator()(f32v c, int) const { return c; }
};

// c = before(c, j) + a b for c [rows, VECTORS * W], where j counts the vectors of a row. The
// product is summed apart from c: blocks of a long sum, added up, lose less than one long chain.
template <int64_t UNIT, int VECTORS, typename Left, typename Before>
inline void add_product(int64_t rows, int64_t units, Left a, const float* b, int64_t b_stride,
                        float* c, int64_t c_stride, Before before) {
  for (int64_t r = 0; r < rows; r += BLOCK)
    product<UNIT, VECTORS>(units, Left{a.at(r, 0), a.stride}, b, b_stride, [&](auto& sums) {
#pragma GCC unroll 8
      for (int i = 0; i < BLOCK; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) {
          float* to = c + (r + i) * c_stride + j * W;
          store(to, before(load(to), j) + sums[i][j]);
        }
    });
}

// ---- packing ----

// W units of a row; numbers past `count` are zero.
template <typename T>
inline f32v load_units(const T* x, int64_t count) {
  constexpr int64_t COUNT = unit<T>() * W;
  if constexpr (unit<T>() == 1) return count < COUNT ? load(x, Part{count}) : load(x);
#if defined(__AVX512BF16__)
  if (count < COUNT) return (f32v)_mm512_maskz_loadu_epi16((1u << count) - 1, x);
#endif
  f32v v;
  memcpy(&v, x, sizeof v);
  return v;
}

// x [rows, n] -> [padded rows, n / UNIT]; stride a multiple of W.
template <typename T>
inline void pack_rows(const T* x, int64_t x_stride, int64_t rows, int64_t padded, int64_t n,
                      float* to, int64_t stride) {
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t i = 0; i < n; i += unit<T>() * W)
      store(to + r * stride + i / unit<T>(),
            r < rows ? load_units(x + r * x_stride + i, n - i) : f32v{});
}

// Units that run down the columns: row r in their low half, row r + 1 in their high half.
inline f32v interleave(u16v low, u16v high) { return (f32v)(widen(low) | widen(high) << 16); }

// Rows r and r + 1 of a matrix with units down the columns, one vector wide.
template <int64_t UNIT>
inline void store_two_rows(float* to, int64_t stride, int64_t r, f32v first, f32v second) {
  if (UNIT == 1) {
    store(to + r * stride, first);
    store(to + (r + 1) * stride, second);
  } else {
    store(to + r / 2 * stride, interleave(narrow(first, bf16{}), narrow(second, bf16{})));
  }
}

// W units that run down the columns of x from row r; numbers past `rows` or `count` are zero.
template <typename T>
inline f32v load_column_units(const T* x, int64_t x_stride, int64_t r, int64_t rows,
                              int64_t count) {
  const T* from = x + r * x_stride;
  if constexpr (unit<T>() == 1) return r < rows ? load_units(from, count) : f32v{};
  u16v low = {}, high = {};
  if (r + 1 < rows && count >= W) {
    memcpy(&low, from, sizeof low);
    memcpy(&high, from + x_stride, sizeof high);
  } else {
    const int64_t bytes = (count < W ? count : W) * sizeof(T);
    if (r < rows) memcpy(&low, from, bytes);
    if (r + 1 < rows) memcpy(&high, from + x_stride, bytes);
  }
  return interleave(low, high);
}

// x [rows, n] -> [padded rows / UNIT, n] with units down the columns.
template <typename T>
inline void pack_columns(const T* x, int64_t x_stride, int64_t rows, int64_t padded, int64_t n,
                         float* to, int64_t stride) {
  for (int64_t r = 0; r < padded; r += unit<T>())
    for (int64_t i = 0; i < n; i += W)
      store(to + r / unit<T>() * stride + i, load_column_units(x + i, x_stride, r, rows, n - i));
}

// Lane i is lane index[i] of a, or index[i] - W of b.
inline f32v shuffle(f32v a, f32v b, i32v index) {
#if defined(__clang__)
  f32v result;
  for (int i = 0; i < W; ++i) result[i] = index[i] < W ? a[index[i]] : b[index[i] - W];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

template <int STEP, int ROWS = W>
inline void exchange(f32v* rows) {
  i32v low, high;
  for (int j = 0; j < W; ++j) {
    low[j] = j & STEP ? W + j - STEP : j;
    high[j] = j & STEP ? W + j : j + STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    if (i & STEP) continue;
    const f32v a = rows[i], b = rows[i + STEP];
    rows[i] = shuffle(a, b, low);
    rows[i + STEP] = shuffle(a, b, high);
  }
}

// W rows of W lanes; off-diagonal squares of halving size change places.
template <int STEP = W / 2>
inline void transpose(f32v* rows) {
  exchange<STEP>(rows);
  if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

// Lane i is the sum of row i: a transposition whose halves are added as soon as they lie alike.
template <int STEP = W / 2>
inline f32v sums_of_rows(f32v* rows) {
  exchange<STEP, 2 * STEP>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < STEP; ++i) rows[i] += rows[i + STEP];
  if constexpr (STEP > 1) return sums_of_rows<STEP / 2>(rows);
  return rows[0];
}

// x [rows, n] transposed -> [n / UNIT, PANEL]: x's rows become the columns of a panel.
template <typename T>
inline void pack_panel(const T* x, int64_t x_stride, int64_t rows, int64_t n, float* to) {
  constexpr int64_t UNIT = unit<T>();
  for (int64_t first = 0; first < rows; first += W)
    for (int64_t i = 0; i < n; i += UNIT * W) {
      f32v v[W];
      for (int64_t r = 0; r < W; ++r)
        v[r] = first + r < rows ? load_units(x + (first + r) * x_stride + i, n - i) : f32v{};
      transpose<>(v);
      for (int64_t u = 0; u < W; ++u) store(to + (i / UNIT + u) * PANEL + first, v[u]);
    }
}

// The inverse for results: panel [n, PANEL], times factor per column, -> x [rows, n].
template <typename T>
inline void unpack_panel(const float* panel, int64_t rows, int64_t n, const float* factors, T* x,
                         int64_t x_stride) {
  for (int64_t first = 0; first < rows; first += W) {
    const f32v factor = load(factors + first);
    for_each_vector(n, [&](int64_t i, auto lanes) {
      f32v v[W];
      for (int64_t d = 0; d < W; ++d) v[d] = load(panel + (i + d) * PANEL + first) * factor;
      transpose<>(v);
      for (int64_t r = 0; r < W && first + r < rows; ++r)
        store(x + (first + r) * x_stride + i, v[r], lanes);
    });
  }
}

}  // namespace LLAMA2RT_ISA

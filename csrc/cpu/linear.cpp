// y = x weight^T for the few rows of a decoding step, where a matrix product is a walk through the
// weight and nothing else: each weight is read once, whatever the number of rows.
//
// x is packed once per call into the units that the processor multiplies (matrix.h), a vector of each
// row after another, and stays in the cache: rows a power of two apart would evict each other. A tile
// of the weight's rows shares every load of x, and a row of x every load of the weight. Sums are fp32, in
// the same order for any number of threads and of rows.
//
// Left out: blocking over the inner dimension. Beyond a few rows a library's product is faster.
#include "matrix.h"
#include "parallel.h"

namespace LLAMA2RT_ISA {
namespace {

constexpr int MOST = 4;  // rows of x at a time

// Rows of the weight in a tile: sums, and one vector for each operand, fit the registers.
constexpr int tile_rows(int rows) { return W == 16 || rows <= 2 ? 4 : 2; }

template <typename T, int ROWS>
void some_rows(const Linear& a, const T* x, T* y) {
  constexpr int64_t STEP = unit<T>() * W;
  constexpr int TILE = tile_rows(ROWS);
  const int64_t n = a.inner, whole = n / STEP * STEP;
  Workspace<> packed(ROWS * (whole / STEP + 1) * W);
  for (int64_t i = 0; i < n; i += STEP)
    for (int r = 0; r < ROWS; ++r)
      store(packed.data + (i / STEP * ROWS + r) * W, load_units(x + r * a.x.stride + i, n - i));
  const int64_t tiles = (a.columns + TILE - 1) / TILE;
  parallel(tiles, a.columns * n, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * TILE;
      const int64_t left = a.columns - first;
      const T* weight[TILE];
      for (int j = 0; j < TILE; ++j)  // past the last row: that row again, and its sum is dropped
        weight[j] = (const T*)a.weight.data + (first + (j < left ? j : left - 1)) * a.weight.stride;
      f32v sums[ROWS][TILE] = {};
      auto step = [&](int64_t i, auto load_weight) {
        f32v w[TILE];
#pragma GCC unroll 4
        for (int j = 0; j < TILE; ++j) w[j] = load_weight(weight[j] + i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const f32v v = load(packed.data + (i / STEP * ROWS + r) * W);
#pragma GCC unroll 4
          for (int j = 0; j < TILE; ++j) sums[r][j] = multiply_add<unit<T>()>(v, w[j], sums[r][j]);
        }
      };
      for (int64_t i = 0; i < whole; i += STEP)
        step(i, [&](const T* p) { return load_units(p, STEP); });
      if (whole < n) step(whole, [&](const T* p) { return load_units(p, n - whole); });
      for (int r = 0; r < ROWS; ++r) {
        f32v result = {};
        for (int j = 0; j < TILE; ++j) result[j] = sum(sums[r][j]);
        store(y + r * a.columns + first, result, Part{left < TILE ? left : TILE});
      }
    }
  });
}

template <typename T>
void product(const Linear& a) {
  for (int64_t row = 0; row < a.rows; row += MOST) {
    const int64_t rows = a.rows - row < MOST ? a.rows - row : MOST;
    const T* x = (const T*)a.x.data + row * a.x.stride;
    T* y = (T*)a.y + row * a.columns;
    switch (rows) {
      case 1: some_rows<T, 1>(a, x, y); break;
      case 2: some_rows<T, 2>(a, x, y); break;
      case 3: some_rows<T, 3>(a, x, y); break;
      default: some_rows<T, MOST>(a, x, y);
    }
  }
}

}  // namespace

void linear(const Linear& a) {
  by_dtype(a.dtype, [&](auto t) { product<decltype(t)>(a); });
}

}  // namespace LLAMA2RT_ISA

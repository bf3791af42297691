// dy^T x: the gradient of a linear layer's weight, from those of its outputs and from its inputs.
//
// The sum runs down the columns of both, across the pairs that the processor multiplies, so both are
// packed (matrix.h): x once, in panels that all threads read; dy as it is needed, each thread its
// own. A panel's part of DEPTH units stays in the first cache while HEIGHT columns of dy pass it, and
// their sums stay in the second until the whole sum is done: fp32, rounded once. Which thread does
// what changes no bit.
//
// A library's product does the same for the layouts it likes; here it transposes first, and that
// costs it a tenth of the time. docs/kernels/token_logprob.md has the figures.
#include "matrix.h"
#include "parallel.h"

namespace LLAMA2RT_ISA {
namespace {

constexpr int64_t DEPTH = 256;   // units of a sum at a time: 32 KB of a panel with 16 lanes
constexpr int64_t HEIGHT = 128;  // columns of dy for one set of sums, at most
constexpr int64_t WIDTH = 512;   // columns of x for one, at most: 256 KB of sums
// From one block of BLOCK columns to the next; a power of two apart they would evict each other.
constexpr int64_t BLOCK_STRIDE = DEPTH * BLOCK + 16;

// One unit of dy's columns, W at most, into their blocks.
template <typename T>
inline void pack_unit(const T* dy, int64_t stride, int64_t unit_row, int64_t rows, int64_t n,
                      float* to) {
  static_assert(W % BLOCK == 0, "a vector fills whole blocks");
  const f32v v = load_column_units(dy, stride, unit_row, rows, n);
  for (int64_t j = 0; j < W; j += BLOCK)
    memcpy(to + j / BLOCK * BLOCK_STRIDE, (const float*)&v + j, BLOCK * sizeof(float));
}

#if defined(__AVX512BF16__)
// Two units, four rows, of 32 columns: whole cache lines of four blocks.
inline void pack_two_units(const bf16* dy, int64_t stride, float* to) {
  __m512i low[2], high[2];
  for (int u = 0; u < 2; ++u) {
    const __m512i first = _mm512_loadu_si512(dy + 2 * u * stride);
    const __m512i second = _mm512_loadu_si512(dy + (2 * u + 1) * stride);
    low[u] = _mm512_unpacklo_epi16(first, second);
    high[u] = _mm512_unpackhi_epi16(first, second);
  }
  // Quarter b of low and of high are block b: four by four quarters are transposed.
  const __m512i a = _mm512_shuffle_i64x2(low[0], high[0], 0x44);
  const __m512i b = _mm512_shuffle_i64x2(low[1], high[1], 0x44);
  const __m512i c = _mm512_shuffle_i64x2(low[0], high[0], 0xee);
  const __m512i d = _mm512_shuffle_i64x2(low[1], high[1], 0xee);
  _mm512_storeu_si512(to, _mm512_shuffle_i64x2(a, b, 0x88));
  _mm512_storeu_si512(to + BLOCK_STRIDE, _mm512_shuffle_i64x2(a, b, 0xdd));
  _mm512_storeu_si512(to + 2 * BLOCK_STRIDE, _mm512_shuffle_i64x2(c, d, 0x88));
  _mm512_storeu_si512(to + 3 * BLOCK_STRIDE, _mm512_shuffle_i64x2(c, d, 0xdd));
}
#endif

// dy [rows, n] -> [padded n / BLOCK, units, BLOCK]: what BLOCK rows of a product take lies together.
template <typename T>
void pack_blocks(const T* dy, int64_t stride, int64_t rows, int64_t n, float* to) {
  constexpr int64_t UNIT = unit<T>(), GROUP = 2 * UNIT, AHEAD = 16;
  auto at = [&](int64_t column, int64_t row) {
    return to + column / BLOCK * BLOCK_STRIDE + row / UNIT * BLOCK;
  };
  for (int64_t row = 0; row < rows; row += GROUP) {
    // Rows lie too far apart for the processor to guess the next.
    for (int64_t r = row + AHEAD; r < row + AHEAD + GROUP && r < rows; ++r)
      for (int64_t c = 0; c < n; c += 64 / sizeof(T)) __builtin_prefetch(dy + r * stride + c);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if constexpr (UNIT == 2)
      for (; row + GROUP <= rows && i + 32 <= n; i += 32)
        pack_two_units(dy + row * stride + i, stride, at(i, row));
#endif
    for (int64_t r = row; r < row + GROUP && r < rows; r += UNIT)
      for (int64_t j = i; j < n; j += W) pack_unit(dy + j, stride, r, rows, n - j, at(j, r));
  }
}

// sums [n, WIDTH] (+)= a part of the product over `units`, one panel wide.
template <int64_t UNIT, int VECTORS>
void add_panel(int64_t n, int64_t units, const float* blocks, const float* panel, float* sums,
               bool first) {
  for (int64_t i = 0; i < n; i += BLOCK)
    product<UNIT, VECTORS>(
        units, ByColumn{blocks + i / BLOCK * BLOCK_STRIDE, BLOCK}, panel, PANEL, [&](auto& some) {
#pragma GCC unroll 8
          for (int64_t r = 0; r < BLOCK; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) {
              float* to = sums + (i + r) * WIDTH + j * W;
              store(to, first ? some[r][j] : load(to) + some[r][j]);
            }
        });
}

template <typename T>
void product_of(const WeightGradient& a) {
  constexpr int64_t UNIT = unit<T>(), ROWS = DEPTH * UNIT;
  const T *dy = (const T*)a.dy.data, *x = (const T*)a.x.data;
  const int64_t units = round_up(a.rows, UNIT) / UNIT, padded = round_up(a.inner, PANEL);
  const int64_t panels = padded / PANEL, depths = round_up(units, DEPTH) / DEPTH;
  const int threads = useful_threads(a.rows, a.rows * (a.columns + a.inner), a.threads);

  // One depth after another, in it one panel after another.
  Workspace<> packed(units * padded);
  auto panel_at = [&](int64_t depth, int64_t panel, int64_t count) {
    return packed.data + depth * DEPTH * padded + panel * count * PANEL;
  };
  auto count_at = [&](int64_t depth) {
    return units - depth * DEPTH < DEPTH ? units - depth * DEPTH : DEPTH;
  };
  share(depths * panels, threads, 0, [&](int64_t item, float*) {
    const int64_t depth = item / panels, panel = item % panels, row = depth * ROWS;
    const int64_t count = count_at(depth), left = a.inner - panel * PANEL;
    pack_columns(x + row * a.x.stride + panel * PANEL, a.x.stride, a.rows - row, count * UNIT,
                 left < PANEL ? left : PANEL, panel_at(depth, panel, count), PANEL);
  });

  const int64_t across = round_up(a.inner, WIDTH) / WIDTH;
  if (across == 0 || a.columns == 0) return;
  const int64_t width = round_up((a.inner + across - 1) / across, PANEL);
  // So many that threads have as much to do as each other.
  const int64_t down = round_up(round_up(a.columns, HEIGHT) / HEIGHT * across, threads) / across;
  const int64_t height = round_up((a.columns + down - 1) / down, BLOCK);
  const int64_t items = across * (round_up(a.columns, height) / height);
  share(items, threads, HEIGHT / BLOCK * BLOCK_STRIDE + HEIGHT * WIDTH, [&](int64_t item, float* scratch) {
    const int64_t column = item / across * height, begin = item % across * width;
    const int64_t n = a.columns - column < height ? a.columns - column : height;
    const int64_t end = a.inner - begin < width ? a.inner : begin + width;
    float *blocks = scratch, *sums = scratch + HEIGHT / BLOCK * BLOCK_STRIDE;
    // Once even without rows: an empty sum is zero.
    for (int64_t depth = 0; depth == 0 || depth < depths; ++depth) {
      const int64_t row = depth * ROWS, count = count_at(depth);
      pack_blocks(dy + row * a.dy.stride + column, a.dy.stride,
                  a.rows - row < ROWS ? a.rows - row : ROWS, n, blocks);
      for (int64_t i = begin; i < end; i += PANEL) {
        const float* panel = panel_at(depth, i / PANEL, count);
        auto add = end - i > W ? add_panel<UNIT, 2> : add_panel<UNIT, 1>;
        add(n, count, blocks, panel, sums + i - begin, depth == 0);
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      const int64_t to = (column + r) * a.inner + begin;
      for_each_vector(end - begin, [&](int64_t i, auto lanes) {
        const f32v some = load(sums + r * WIDTH + i, lanes);
        if (a.sum)
          store(a.sum + to + i, load(a.sum + to + i, lanes) + some, lanes);
        else
          store((T*)a.dweight + to + i, some, lanes);
      });
    }
  });
}

}  // namespace

void weight_gradient(const WeightGradient& a) {
  by_dtype(a.dtype, [&](auto t) { product_of<decltype(t)>(a); });
}

}  // namespace LLAMA2RT_ISA

// y = x weight^T for a weight in panels (panels.h), and the packing of a weight.
//
// With few rows the product is a walk through the weight, whose panels lie one after another; with
// more, a block of a panel (CHAIN numbers deep, 16 KiB of fp32 at most) is widened once and multiplied
// by all rows while it is in the first cache. Sums are fp32, in chains of CHAIN numbers that are then
// added in order: the same bits for a row whatever rows stand beside it, and for any number of threads.
//
// Left out: activations in int8. Where the weights come from memory, arithmetic on them is not what
// a few rows wait for, and activations have outliers that a scale for each row does not hold.
#include "panels.h"
#include "parallel.h"

namespace LLAMA2RT_ISA {
namespace {

constexpr int REGISTERS = W == 16 ? 24 : 12;  // that hold sums: the others hold the operands
constexpr int MOST_ROWS = W == 16 ? 12 : 6;   // of a block, with two vectors of sums in each
constexpr int DIRECT_ROWS = 4;                // up to which a weight is widened in registers
constexpr int64_t SLAB = 512;                 // rows of x that are widened at a time
constexpr int64_t TILE = 64;                  // rows that use a block of a panel together
constexpr int64_t AHEAD = 1024;               // bytes, in a walk through a panel

// Vectors of a panel that a pass over a block takes, and panels that it walks at once: a sum must not
// be waited for.
constexpr int vectors_for(int rows) {
  int vectors = PANEL_VECTORS;
  while (vectors > 1 && rows * vectors > REGISTERS) vectors /= 2;
  return vectors;
}
constexpr int panels_for(int rows) {
  const int sums = rows * vectors_for(rows);
  return sums >= 8 ? 1 : sums > 3 ? 2 : 4;
}

// x widened: rows of 32-bit units, `stride` apart.
struct Left {
  const float* data;
  int64_t stride;
};

// A run of steps of one panel, or of several panels that lie `panel_lanes` apart.
template <typename P>
struct Run {
  const typename P::Lane* lanes;
  int64_t panel_lanes, steps;
  int64_t ahead = AHEAD;  // bytes from the lanes in use to prefetched ones
};

template <int N>
struct Constant {
  static constexpr int VALUE = N;
};

// body(Constant<rows>), for 1 to MOST rows.
template <int MOST, typename Body>
inline void with_rows(int64_t rows, Body body) {
  if constexpr (MOST > 1)
    if (rows < MOST) return with_rows<MOST - 1>(rows, body);
  body(Constant<MOST>{});
}

// ROWS of x times VECTORS of PANELS panels, added to c [rows, PANELS * 32] or, at `first`, put there.
template <typename P, int64_t UNIT, int ROWS, int VECTORS, int PANELS, bool PREFETCH>
inline void multiply(Left x, Run<P> run, float* c, int64_t c_stride, bool first) {
  f32v sums[PANELS][ROWS][VECTORS];
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[p][r][v] = f32v{};
  for (int64_t s = 0; s < run.steps; ++s) {
    const typename P::Lane* step = run.lanes + s * PANEL_COLUMNS;
    if (PREFETCH)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 2
        for (int64_t byte = 0; byte < (int64_t)sizeof(*step) * PANEL_COLUMNS; byte += 64)
          __builtin_prefetch((const char*)(step + p * run.panel_lanes) + run.ahead + byte);
#pragma GCC unroll 4
    for (int i = 0; i < P::NUMBERS; ++i)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) {
        f32v w[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) w[v] = P::number(step + p * run.panel_lanes, v, i);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
          const f32v left = repeat(x.data + r * x.stride + s * P::NUMBERS + i);
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v)
            sums[p][r][v] = multiply_add<UNIT>(left, w[v], sums[p][r][v]);
        }
      }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        float* to = c + r * c_stride + p * PANEL_COLUMNS + v * W;
        store(to, first ? sums[p][r][v] : load(to) + sums[p][r][v]);
      }
}

// All columns of PANELS panels.
template <typename P, int64_t UNIT, int ROWS, int PANELS, bool PREFETCH>
inline void multiply_panels(Left x, Run<P> run, float* c, int64_t c_stride, bool first) {
  constexpr int VECTORS = vectors_for(ROWS);
  for (int v = 0; v < PANEL_VECTORS; v += VECTORS) {
    const Run<P> part = {run.lanes + v * W, run.panel_lanes, run.steps, run.ahead};
    multiply<P, UNIT, ROWS, VECTORS, PANELS, PREFETCH>(x, part, c + v * W, c_stride, first);
  }
}

// The sums of so many panels from `panel`, in c [rows, 32 each].
template <typename P, int64_t UNIT, int ROWS, int PANELS>
__attribute__((noinline)) void few_rows(const PackedWeight& weight, int64_t panel, Left x, float* c) {
  const int64_t steps = steps_of(weight), lanes = steps * PANEL_COLUMNS;
  const typename P::Lane* from = (const typename P::Lane*)weight.data + panel * lanes;
  const int64_t chain = CHAIN / (UNIT * P::NUMBERS);
  for (int64_t s = 0; s < steps; s += chain) {
    const Run<P> run = {from + s * PANEL_COLUMNS, lanes, s + chain < steps ? chain : steps - s};
    const Left part = {x.data + s * P::NUMBERS, x.stride};
    multiply_panels<P, UNIT, ROWS, PANELS, true>(part, run, c, PANELS * PANEL_COLUMNS, s == 0);
  }
}

// A block of a panel in fp32 lanes, one step a number.
template <typename P>
inline const float* widened(const typename P::Lane* from, int64_t steps, float* scratch) {
  for (int64_t s = 0; s < steps; ++s)
    for (int v = 0; v < PANEL_VECTORS; ++v)
#pragma GCC unroll 4
      for (int i = 0; i < P::NUMBERS; ++i)
        store(scratch + (s * P::NUMBERS + i) * PANEL_COLUMNS + v * W,
              P::number(from + s * PANEL_COLUMNS, v, i));
  return scratch;
}
inline const float* as_lanes(Fp32Panel, const float* from, int64_t, float*) { return from; }
inline const float* as_lanes(Bf16PairPanel, const uint32_t* from, int64_t, float*) {
  return (const float*)from;
}
template <typename P>
inline const float* as_lanes(P, const typename P::Lane* from, int64_t steps, float* scratch) {
  return widened<P>(from, steps, scratch);
}

// The same for one panel and any number of rows; scratch: CHAIN * 32 floats.
template <typename P, int64_t UNIT>
__attribute__((noinline)) void many_rows(const PackedWeight& weight, int64_t panel, Left x, int64_t rows, float* c,
                      float* scratch) {
  const int64_t steps = steps_of(weight);
  const typename P::Lane* from =
      (const typename P::Lane*)weight.data + panel * steps * PANEL_COLUMNS;
  const int64_t chain = CHAIN / (UNIT * P::NUMBERS), blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int64_t s = 0; s < steps; s += chain) {
    const int64_t count = s + chain < steps ? chain : steps - s;
    const float* lanes = as_lanes(P{}, from + s * PANEL_COLUMNS, count, scratch);
    Run<Fp32Panel> run = {lanes, 0, count * P::NUMBERS};
    run.ahead = count * PANEL_COLUMNS * (int64_t)sizeof(float);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = rows * block / blocks, end = rows * (block + 1) / blocks;
      const Left part = {x.data + row * x.stride + s * P::NUMBERS, x.stride};
      float* sums = c + row * PANEL_COLUMNS;
      with_rows<MOST_ROWS>(end - row, [&](auto n) {
        constexpr int ROWS = decltype(n)::VALUE;
        // The last rows that use this block of the panel ask for the next one, which lies behind it.
        // The only ones are too fast for that: what comes from memory then is what they wait for.
        if ((const void*)lanes != scratch && 0 < block && block == blocks - 1)
          multiply_panels<Fp32Panel, UNIT, ROWS, 1, true>(part, run, sums, PANEL_COLUMNS, s == 0);
        else
          multiply_panels<Fp32Panel, UNIT, ROWS, 1, false>(part, run, sums, PANEL_COLUMNS, s == 0);
      });
    }
  }
}

// The sums c [rows, count * 32] of `count` panels, times their columns' scales -> y.
template <typename Y>
void finish(const PackedLinear& a, int64_t panel, int64_t count, const float* c, int64_t row,
            int64_t rows) {
  const int64_t first = panel * PANEL_COLUMNS;
  const int64_t left = a.weight.columns - first, width = count * PANEL_COLUMNS;
  const int64_t columns = left < width ? left : width;
  for (int64_t r = 0; r < rows; ++r) {
    Y* y = (Y*)a.y + (row + r) * a.y_stride + first;
    for_each_vector(columns, [&](int64_t i, auto lanes) {
      f32v sum = load(c + r * width + i);
      if (a.weight.scales) sum *= load(a.weight.scales + first + i) * INT8_SCALE;
      store(y + i, sum, lanes);
    });
  }
}

template <typename P, int64_t UNIT, typename Y>
void slab(const PackedLinear& a, Left x, int64_t row, int64_t rows) {
  const int64_t panels = (a.weight.columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
  const int64_t elements = rows * a.weight.columns * a.weight.inner;
  if (rows <= DIRECT_ROWS) {
    with_rows<DIRECT_ROWS>(rows, [&](auto n) {
      constexpr int ROWS = decltype(n)::VALUE, PANELS = panels_for(ROWS);
      const int64_t groups = (panels + PANELS - 1) / PANELS;
      parallel(groups, elements, a.threads, [&](int64_t begin, int64_t end) {
        alignas(64) float c[DIRECT_ROWS * PANELS * PANEL_COLUMNS];
        for (int64_t panel = begin * PANELS; panel < panels && panel < end * PANELS;) {
          const int64_t count = panel + PANELS <= panels ? PANELS : 1;
          if (count == PANELS)
            few_rows<P, UNIT, ROWS, PANELS>(a.weight, panel, x, c);
          else
            few_rows<P, UNIT, ROWS, 1>(a.weight, panel, x, c);
          finish<Y>(a, panel, count, c, row, rows);
          panel += count;
        }
      });
    });
    return;
  }
  const int64_t tiles = (rows + TILE - 1) / TILE;
  parallel(tiles * panels, elements, a.threads, [&](int64_t begin, int64_t end) {
    alignas(64) float c[TILE * PANEL_COLUMNS], scratch[CHAIN * PANEL_COLUMNS];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / panels, panel = item % panels;
      const int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
      many_rows<P, UNIT>(a.weight, panel, Left{x.data + first * x.stride, x.stride}, last - first,
                         c, scratch);
      finish<Y>(a, panel, 1, c, row + first, last - first);
    }
  });
}

// W units of a row of x; numbers past `count` are zero.
template <int64_t UNIT, typename T>
inline f32v load_left(const T* x, int64_t count) {
  if constexpr (UNIT == 1) return count < W ? load(x, Part{count}) : load(x);
  return load_units(x, count);
}

// Whether rows of x are rows of units already: fp32, or whole pairs of bf16. Rows a multiple of 4 KiB
// apart would evict each other from the first cache.
template <int64_t UNIT, typename T>
inline bool usable_as_it_is(const PackedLinear& a) {
  const int64_t numbers = numbers_of(a.weight.storage);
  if (UNIT * sizeof(T) != sizeof(float)) return false;
  return a.x.stride % UNIT == 0 && a.x.stride / UNIT % 1024 != 0 &&
         steps_of(a.weight) * numbers == a.weight.inner;
}

template <typename P, int64_t UNIT, typename T, typename Y>
void product(const PackedLinear& a) {
  if (usable_as_it_is<UNIT, T>(a)) {
    const int64_t stride = a.x.stride / UNIT;
    for (int64_t row = 0; row < a.rows; row += SLAB) {
      const int64_t rows = a.rows - row < SLAB ? a.rows - row : SLAB;
      slab<P, UNIT, Y>(a, Left{(const float*)a.x.data + row * stride, stride}, row, rows);
    }
    return;
  }
  const int64_t n = a.weight.inner, stride = round_up(n / UNIT + 1, 64) + 16;
  Workspace<> wide((a.rows < SLAB ? a.rows : SLAB) * stride);
  for (int64_t row = 0; row < a.rows; row += SLAB) {
    const int64_t rows = a.rows - row < SLAB ? a.rows - row : SLAB;
    parallel(rows, rows * n, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = (const T*)a.x.data + (row + r) * a.x.stride;
        for (int64_t i = 0; i < n; i += UNIT * W)
          store(wide.data + r * stride + i / UNIT, load_left<UNIT>(from + i, n - i));
      }
    });
    slab<P, UNIT, Y>(a, Left{wide.data, stride}, row, rows);
  }
}

template <typename T, typename Y>
void by_storage(const PackedLinear& a) {
  if (a.weight.storage == Storage::int8) return product<Int8Panel, 1, T, Y>(a);
  if constexpr (unit<T>() == 2)
    product<Bf16PairPanel, 2, T, Y>(a);
  else if constexpr (is_bf16(T{}))
    product<Bf16Panel, 1, T, Y>(a);
  else if constexpr (sizeof(T) == 2)
    product<Fp16Panel, 1, T, Y>(a);
  else
    product<Fp32Panel, 1, T, Y>(a);
}

}  // namespace

void packed_linear(const PackedLinear& a) {
  require(a.weight.storage == Storage::int8 || a.weight.storage == (Storage)a.dtype,
          "a packed weight is of its input's dtype or int8");
  by_dtype(a.dtype, [&](auto t) {
    if (a.y_is_fp32)
      by_storage<decltype(t), float>(a);
    else
      by_storage<decltype(t), decltype(t)>(a);
  });
}

}  // namespace LLAMA2RT_ISA

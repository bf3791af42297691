// y = x weight^T for a weight in panels (panels.h).
//
// With few rows the product is a walk through the weight, whose panels lie one after another; with
// more, a block of a panel (a chain deep, 16 KiB of fp32 or of pairs at most) is widened once and
// multiplied by all rows while it is in the first cache. Sums are fp32, in chains of CHAIN units that are
// then added in order: the same bits for a row whatever rows stand beside it, and for any number of
// threads.
//
// With int8 weights, x of 16 bits becomes int16: each CHAIN of a row in steps of its largest absolute
// value / 32767. That is finer than x itself by 8 bits (bf16) or 5 (fp16) where numbers are alike, and an
// outlier costs its own chain alone. Products and sums of a chain are then exact in int32, twice as many
// at once as in fp32. An x of fp32 is multiplied in fp32.
//
// Left out: activations in int8, which would be as much faster again and cost as much accuracy as the
// weights in int8 do.
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

// x widened: rows of 32-bit units, `stride` apart; of int16 also a scale for each chain of a row.
struct Left {
  const float* data;
  int64_t stride;
  const float* scales = nullptr;
  int64_t scales_stride = 0;

  // From that row, unit and chain on.
  Left at(int64_t row, int64_t unit, int64_t chain) const {
    return {data + row * stride + unit, stride,
            scales ? scales + row * scales_stride + chain : nullptr, scales_stride};
  }
};

// A run of steps of one panel, or of several panels that lie `panel_lanes` apart.
template <typename P>
struct Run {
  const typename P::Lane* lanes;
  int64_t panel_lanes, steps;
  const char* next = nullptr;  // asked for meanwhile, `pace` bytes a step
  int64_t pace = 0;
};

// What a run asks memory for: nothing, its own lanes AHEAD of their use, or what `next` says.
enum class Prefetch { none, own, next };

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

// By which a panel's numbers are too large.
template <typename P>
constexpr float scale_of(P) {
  return 1;
}
constexpr float scale_of(Int8Panel) { return Int8Panel::SCALE; }

// Where sums go between the chains of a row, and whence they come: c [rows, stride].
struct Kept {
  float* c;
  int64_t stride;
  bool first;  // there are none yet

  f32v before(int64_t row, int64_t lane) const {
    return first ? f32v{} : load(c + row * stride + lane);
  }
  void finish(int64_t row, int64_t lane, f32v sum) const { store(c + row * stride + lane, sum); }
  void prepare(int64_t) const {}
  Kept at(int64_t row, int64_t lane) const { return {c + row * stride + lane, stride, first}; }
};

// Where they go after the last chain: times their columns' scales, to y, which has so many columns left.
template <typename P, typename Y>
struct Result {
  Kept kept;
  Y* y;
  int64_t stride, columns;
  const float* scales;  // none, or one for each column

  f32v before(int64_t row, int64_t lane) const { return kept.before(row, lane); }
  void finish(int64_t row, int64_t lane, f32v sum) const {
    if (scales) sum *= load(scales + lane) * scale_of(P{});
    Y* to = y + row * stride + lane;
    if (columns - lane >= W)
      store(to, sum);
    else if (columns - lane > 0)
      store(to, sum, Part{columns - lane});
  }
  // A line that is to be written has to be here first, and comes while there is something to compute.
  void prepare(int64_t row) const { __builtin_prefetch(y + row * stride, 1); }
  Result at(int64_t row, int64_t lane) const {
    return {kept.at(row, lane), y + row * stride + lane, stride, columns - lane,
            scales ? scales + lane : nullptr};
  }
};

// ROWS of x times VECTORS of PANELS panels; what becomes of the sums [rows, PANELS * 32] is for `out`.
// By reference here and below: copied a vector at a time, just after fields of it were written, arguments
// cost a tenth of a large product (the processor forwards a store to a load of its own size only).
template <typename P, typename A, int ROWS, int VECTORS, int PANELS, Prefetch PREFETCH, typename Out>
inline void multiply(const Left& x, const Run<P>& run, const Out& out) {
  typename A::Sum sums[PANELS][ROWS][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) out.prepare(r);
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[p][r][v] = typename A::Sum{};
  for (int64_t s = 0; s < run.steps; ++s) {
    const typename P::Lane* step = run.lanes + s * PANEL_COLUMNS;
    if (PREFETCH == Prefetch::next) __builtin_prefetch(run.next + s * run.pace);
    if (PREFETCH == Prefetch::own)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 2
        for (int64_t byte = 0; byte < (int64_t)sizeof(*step) * PANEL_COLUMNS; byte += 64)
          __builtin_prefetch((const char*)(step + p * run.panel_lanes) + AHEAD + byte);
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
            sums[p][r][v] = A::multiply_add(left, w[v], sums[p][r][v]);
        }
      }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t lane = p * PANEL_COLUMNS + v * W;
        out.finish(r, lane, A::add(out.before(r, lane), sums[p][r][v],
                                   x.scales + r * x.scales_stride));
      }
}

// Part `part` of `parts` of rows [begin, end) of x, of so many units, into the second cache.
inline void ask_for_rows(const Left& x, int64_t begin, int64_t end, int64_t units, int64_t part,
                         int64_t parts) {
  const int64_t rows = end - begin;
  for (int64_t r = begin + rows * part / parts; r < begin + rows * (part + 1) / parts; ++r)
    for (int64_t unit = 0; unit < units; unit += 16)
      __builtin_prefetch(x.data + r * x.stride + unit, 0, 2);
}

// All columns of PANELS panels.
template <typename P, typename A, int ROWS, int PANELS, Prefetch PREFETCH, typename Out>
inline void multiply_panels(const Left& x, const Run<P>& run, const Out& out) {
  constexpr int VECTORS = vectors_for(ROWS);
  for (int v = 0; v < PANEL_VECTORS; v += VECTORS) {
    const Run<P> part = {run.lanes + v * W, run.panel_lanes, run.steps, run.next, run.pace};
    multiply<P, A, ROWS, VECTORS, PANELS, PREFETCH>(x, part, out.at(0, v * W));
  }
}

// The sums of so many panels from `panel`, in c [rows, 32 each].
template <typename P, typename A, int ROWS, int PANELS>
__attribute__((noinline)) void few_rows(const PackedWeight& weight, int64_t panel, Left x, float* c) {
  const int64_t steps = steps_of(weight), lanes = steps * PANEL_COLUMNS;
  const typename P::Lane* from = (const typename P::Lane*)weight.data + panel * lanes;
  const int64_t chain = A::LENGTH / (A::UNIT * P::NUMBERS);
  for (int64_t s = 0; s < steps; s += chain) {
    const Run<P> run = {from + s * PANEL_COLUMNS, lanes, s + chain < steps ? chain : steps - s};
    const Left part = x.at(0, s * P::NUMBERS, s / chain);
    multiply_panels<P, A, ROWS, PANELS, Prefetch::own>(part, run,
                                                       Kept{c, PANELS * PANEL_COLUMNS, s == 0});
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

// A block of a panel times any number of rows, in blocks of about one size. Each of them asks for its
// share of what lies behind: memory is read while there is something to compute, and not faster than it
// can be.
template <typename P, typename A, Prefetch PREFETCH, typename Out>
inline void multiply_rows(const Left& x, int64_t rows, Run<P> run, const Out& out) {
  const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t bytes = run.steps * PANEL_COLUMNS * (int64_t)sizeof(*run.lanes);
  run.pace = PANEL_COLUMNS * (int64_t)sizeof(*run.lanes) / blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = rows * block / blocks, end = rows * (block + 1) / blocks;
    run.next = (const char*)run.lanes + bytes + bytes * block / blocks;
    with_rows<MOST_ROWS>(end - row, [&](auto n) {
      multiply_panels<P, A, decltype(n)::VALUE, 1, PREFETCH>(x.at(row, 0, 0), run, out.at(row, 0));
    });
  }
}

// A block of a panel, of P's lanes, times rows of x.
template <typename P, typename A, typename Out>
inline void multiply_block(const Left& x, int64_t rows, const Run<P>& run, const Out& out,
                           float* scratch) {
  if constexpr (P::READY) {
    // One block of rows is too fast for asking: what comes from memory then is what it waits for.
    // With two units to a lane there is half as much to wait for.
    constexpr Prefetch ALONE = P::NUMBERS > 1 ? Prefetch::own : Prefetch::none;
    if (rows <= MOST_ROWS)
      multiply_rows<P, A, ALONE>(x, rows, run, out);
    else
      multiply_rows<P, A, Prefetch::next>(x, rows, run, out);
  } else {
    const Run<Fp32Panel> wide = {widened<P>(run.lanes, run.steps, scratch), 0,
                                 run.steps * P::NUMBERS};
    multiply_rows<Fp32Panel, A, Prefetch::none>(x, rows, wide, out);
  }
}

// As few_rows, for one panel and any number of rows, to y; scratch: CHAIN * 32 floats.
template <typename P, typename A, typename Y>
__attribute__((noinline)) void many_rows(const PackedWeight& weight, int64_t panel, Left x,
                                         int64_t rows, Result<P, Y> y, float* scratch) {
  const int64_t steps = steps_of(weight), chain = A::LENGTH / (A::UNIT * P::NUMBERS);
  const typename P::Lane* from =
      (const typename P::Lane*)weight.data + panel * steps * PANEL_COLUMNS;
  for (int64_t s = 0; s < steps; s += chain) {
    const Run<P> run = {from + s * PANEL_COLUMNS, 0, s + chain < steps ? chain : steps - s};
    const Left part = x.at(0, s * P::NUMBERS, s / chain);
    y.kept.first = s == 0;
    if (s + chain < steps)
      multiply_block<P, A>(part, rows, run, y.kept, scratch);
    else
      multiply_block<P, A>(part, rows, run, y, scratch);
  }
}

// The sums c [rows, count * 32] of `count` panels, times their columns' scales -> y.
template <typename P, typename Y>
void finish(const PackedLinear& a, int64_t panel, int64_t count, const float* c, int64_t row,
            int64_t rows) {
  const int64_t first = panel * PANEL_COLUMNS;
  const int64_t left = a.weight.columns - first, width = count * PANEL_COLUMNS;
  const int64_t columns = left < width ? left : width;
  for (int64_t r = 0; r < rows; ++r) {
    Y* y = (Y*)a.y + (row + r) * a.y_stride + first;
    for_each_vector(columns, [&](int64_t i, auto lanes) {
      f32v sum = load(c + r * width + i);
      if (a.weight.scales) sum *= load(a.weight.scales + first + i) * scale_of(P{});
      store(y + i, sum, lanes);
    });
  }
}

template <typename P, typename A, typename Y>
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
            few_rows<P, A, ROWS, PANELS>(a.weight, panel, x, c);
          else
            few_rows<P, A, ROWS, 1>(a.weight, panel, x, c);
          finish<P, Y>(a, panel, count, c, row, rows);
          panel += count;
        }
      });
    });
    return;
  }
  const int64_t tiles = (rows + TILE - 1) / TILE, units = steps_of(a.weight) * P::NUMBERS;
  // In fewer parts than by products alone: of few microseconds each, taking them would count.
  parallel(tiles * panels, elements / 16, a.threads, [&](int64_t begin, int64_t end) {
    alignas(64) float c[TILE * PANEL_COLUMNS], scratch[CHAIN * PANEL_COLUMNS];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / panels, panel = item % panels, column = panel * PANEL_COLUMNS;
      const int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
      const Result<P, Y> y = {Kept{c, PANEL_COLUMNS, true},
                              (Y*)a.y + (row + first) * a.y_stride + column, a.y_stride,
                              a.weight.columns - column,
                              a.weight.scales ? a.weight.scales + column : nullptr};
      if (last < rows) ask_for_rows(x, last, rows * (tile + 2) / tiles, units, panel, panels);
      many_rows<P, A>(a.weight, panel, x.at(first, 0, 0), last - first, y, scratch);
    }
  });
}

// Whether rows of x are rows of units already: fp32, or whole pairs of bf16. Rows a multiple of 4 KiB
// apart would evict each other from the first cache.
template <typename A, typename T>
inline bool usable_as_it_is(const PackedLinear& a) {
  const int64_t numbers = numbers_of(a.weight.storage);
  if (A::SCALED || A::UNIT * sizeof(T) != sizeof(float)) return false;
  return a.x.stride % A::UNIT == 0 && a.x.stride / A::UNIT % 1024 != 0 &&
         steps_of(a.weight) * numbers == a.weight.inner;
}

// A row of n numbers -> units.
template <int64_t UNIT, typename T>
inline void widen_row(Floats<UNIT>, const T* x, int64_t n, float* to, float*) {
  for (int64_t i = 0; i < n; i += UNIT * W)
    if constexpr (UNIT == 1)
      store(to + i, n - i < W ? load(x + i, Part{n - i}) : load(x + i));
    else
      store(to + i / UNIT, load_units(x + i, n - i));
}
template <typename T>
inline void widen_row(Int16Pairs, const T* x, int64_t n, float* to, float* scales) {
  typedef int16_t halves __attribute__((vector_size(2 * W)));
  for (int64_t begin = 0; begin < n; begin += CHAIN) {
    const int64_t count = n - begin < CHAIN ? n - begin : CHAIN;
    const float most = largest(x + begin, count);
    // What is so small that scaling it could overflow counts as nothing.
    const float inverse = most > 1e-30f ? 32767 / most : 0;
    f32v not_finite = {};
    for_each_vector(count, [&](int64_t i, auto lanes) {
      const f32v v = load(x + begin + i, lanes);
      not_finite += v - v;  // 0, or NaN of an infinity and of NaN
      const halves rounded = __builtin_convertvector(nearest(v * inverse), halves);
      memcpy((int16_t*)to + begin + i, &rounded, sizeof rounded);
    });
    scales[begin / CHAIN] = most / 32767 + sum(not_finite);
  }
}

template <typename P, typename A, typename T, typename Y>
void product(const PackedLinear& a) {
  if (a.rows == 0) return;
  if (usable_as_it_is<A, T>(a)) {
    slab<P, A, Y>(a, Left{(const float*)a.x.data, a.x.stride / A::UNIT}, 0, a.rows);
    return;
  }
  const int64_t n = a.weight.inner, stride = round_up(n / A::UNIT + 1, 64) + 16;
  const int64_t most = a.rows < SLAB ? a.rows : SLAB, chains = (n + CHAIN - 1) / CHAIN;
  Workspace<> wide(most * stride), scales(A::SCALED ? most * chains : 0);
  for (int64_t row = 0; row < a.rows; row += SLAB) {
    const int64_t rows = a.rows - row < SLAB ? a.rows - row : SLAB;
    parallel(rows, rows * n, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        widen_row(A{}, (const T*)a.x.data + (row + r) * a.x.stride, n, wide.data + r * stride,
                  scales.data + (A::SCALED ? r * chains : 0));
    });
    slab<P, A, Y>(a, Left{wide.data, stride, scales.data, A::SCALED ? chains : 0}, row, rows);
  }
}

template <typename T, typename Y>
void by_storage(const PackedLinear& a) {
  if (a.weight.storage == Storage::int8) {
    if constexpr (sizeof(T) == 2)
      product<Int8PairPanel, Int16Pairs, T, Y>(a);
    else
      product<Int8Panel, Floats<1>, T, Y>(a);
  } else if constexpr (unit<T>() == 2) {
    product<Bf16PairPanel, Floats<2>, T, Y>(a);
  } else if constexpr (is_bf16(T{})) {
    product<Bf16Panel, Floats<1>, T, Y>(a);
  } else if constexpr (sizeof(T) == 2) {
    product<Fp16Panel, Floats<1>, T, Y>(a);
  } else {
    product<Fp32Panel, Floats<1>, T, Y>(a);
  }
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

// A weight as a checkpoint has it, [columns, inner] by row, into panels (panels.h).
//
// A row of the weight is a column of the product, so lanes of 32 bits are transposed W by W. int8
// numbers are rounded on the way, each column to steps of its largest absolute value / 127.
#include "panels.h"
#include "parallel.h"

namespace LLAMA2RT_ISA {
namespace {

// Row `column` of the parts one below another; null beyond the last.
template <typename T>
const T* row_of(const PackWeight& a, int64_t column) {
  for (const WeightPart& part : a.parts) {
    if (column < part.columns) return (const T*)part.weight.data + column * part.weight.stride;
    column -= part.columns;
  }
  return nullptr;
}

inline void store_bytes(uint8_t* to, f32v x) {
  typedef int8_t bytes __attribute__((vector_size(W)));
  const bytes result = __builtin_convertvector(nearest(x), bytes);
  memcpy(to, &result, sizeof result);
}

// W lanes of a row from number i on; what the row does not have is zero. `inverse`: 1 / scale.
template <typename T>
f32v exact_lanes(const T* row, int64_t i, int64_t n, float) {
  constexpr int64_t COUNT = 4 / sizeof(T) * W;
  T numbers[COUNT] = {};
  if (row) memcpy(numbers, row + i, (n - i < COUNT ? n - i : COUNT) * sizeof(T));
  f32v v;
  memcpy(&v, numbers, sizeof v);
  return v;
}
template <typename T>
f32v int8_lanes(const T* row, int64_t i, int64_t n, float inverse) {
  uint8_t numbers[4 * W] = {};
  if (row)
    for (int64_t j = 0; j < 4 * W && i + j < n; j += W) {
      const int64_t left = n - i - j;
      store_bytes(numbers + j,
                  (left < W ? load(row + i + j, Part{left}) : load(row + i + j)) * inverse);
    }
  u32v lanes;
  memcpy(&lanes, numbers, sizeof lanes);
  return (f32v)((lanes & 0xff0000ff) | (lanes & 0xff00) << 8 | (lanes & 0xff0000) >> 8);
}

// One panel in lanes of 32 bits, of NUMBERS numbers each.
template <int NUMBERS, typename T, typename Lanes>
void pack_panel_of_lanes(const PackWeight& a, int64_t panel, Lanes lanes_of) {
  const int64_t n = a.to.inner, steps = steps_of(a.to);
  float* to = (float*)a.to.data + panel * steps * PANEL_COLUMNS;
  for (int64_t first = 0; first < PANEL_COLUMNS; first += W) {
    const T* rows[W];
    float inverse[W];
    for (int j = 0; j < W; ++j) {
      const int64_t column = panel * PANEL_COLUMNS + first + j;
      rows[j] = row_of<T>(a, column);
      const float most = rows[j] && NUMBERS == 4 ? largest(rows[j], n) : 0.0f;
      inverse[j] = most > 0 ? 127.0f / most : 0.0f;
      if (a.to.scales) a.to.scales[column] = most / 127.0f;
    }
    for (int64_t s = 0; s < steps; s += W) {
      f32v v[W];
      for (int j = 0; j < W; ++j) v[j] = lanes_of(rows[j], s * NUMBERS, n, inverse[j]);
      transpose<>(v);
      for (int64_t u = 0; u < W && s + u < steps; ++u)
        store(to + (s + u) * PANEL_COLUMNS + first, v[u]);
    }
  }
}

void pack_panel_of_halves(const PackWeight& a, int64_t panel) {
  const int64_t n = a.to.inner;
  f16* to = (f16*)a.to.data + panel * n * PANEL_COLUMNS;
  for (int64_t j = 0; j < PANEL_COLUMNS; ++j) {
    const f16* row = row_of<f16>(a, panel * PANEL_COLUMNS + j);
    for (int64_t i = 0; i < n; ++i) to[i * PANEL_COLUMNS + j] = row ? row[i] : f16{0};
  }
}

// W numbers of a row from `column` on; what the row does not have is zero.
template <typename V, typename T>
V some_of(const T* row, int64_t column, int64_t columns) {
  V v = {};
  const int64_t left = columns - column;
  if (row && left >= W)
    memcpy(&v, row + column, sizeof v);
  else if (row && left > 0)
    memcpy(&v, row + column, left * sizeof(T));
  return v;
}

// One panel of a weight [inner, columns]: columns lie beside one another as they are to lie here.
template <typename T>
void pack_panel_of_rows(const PackWeight& a, int64_t panel) {
  constexpr int64_t NUMBERS = is_bf16(T{}) ? 2 : 1;
  const int64_t n = a.to.inner, steps = steps_of(a.to), begin = panel * PANEL_COLUMNS;
  const Matrix& weight = a.parts[0].weight;
  auto row = [&](int64_t i) { return i < n ? (const T*)weight.data + i * weight.stride : nullptr; };
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t first = 0; first < PANEL_COLUMNS; first += W) {
      const int64_t at = (panel * steps + s) * PANEL_COLUMNS + first;
      if constexpr (NUMBERS == 2) {
        const u16v low = some_of<u16v>(row(2 * s), begin + first, a.to.columns);
        const u16v high = some_of<u16v>(row(2 * s + 1), begin + first, a.to.columns);
        store((float*)a.to.data + at, interleave(low, high));
      } else if constexpr (sizeof(T) == 2) {
        const u16v numbers = some_of<u16v>(row(s), begin + first, a.to.columns);
        memcpy((T*)a.to.data + at, &numbers, sizeof numbers);
      } else {
        store((float*)a.to.data + at, some_of<f32v>(row(s), begin + first, a.to.columns));
      }
    }
}

template <typename T>
void pack(const PackWeight& a) {
  const int64_t panels = (a.to.columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
  parallel(panels, a.to.columns * a.to.inner, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      if (a.transposed)
        pack_panel_of_rows<T>(a, panel);
      else if (a.to.storage == Storage::int8)
        pack_panel_of_lanes<4, T>(a, panel, int8_lanes<T>);
      else if (a.to.storage == Storage::fp16)
        pack_panel_of_halves(a, panel);
      else
        pack_panel_of_lanes<4 / sizeof(T), T>(a, panel, exact_lanes<T>);
    }
  });
}

}  // namespace

void pack_weight(const PackWeight& a) {
  require(a.to.storage == Storage::int8 || a.to.storage == (Storage)a.dtype,
          "a weight is packed in its own dtype or as int8");
  require(!a.transposed || a.to.storage != Storage::int8, "an int8 weight is packed as it lies");
  by_dtype(a.dtype, [&](auto t) { pack<decltype(t)>(a); });
}

}  // namespace LLAMA2RT_ISA

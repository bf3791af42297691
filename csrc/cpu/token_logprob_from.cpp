// token_logprob's softmax with the product that makes the logits: a strip of the vocabulary meets a
// few rows of hidden at a time, and its logits are counted, or become gradients, while they are
// still in the second-level cache. For processors on which such a product is no slower than a
// library's (llama2rt/ops/cpu.py chooses); a library's then costs the meetings of its threads and a
// way through the last-level cache on top.
//
// The weight of a strip is packed by whoever takes the strip, into panels that stay in its cache;
// strips are as wide as that allows. Logits are rounded to the dtype, as a library's are, because
// backward must see what forward saw. Results do not depend on who did what.
//
// Left out: the products with the gradients, which are a library's. Hidden's was tried here and
// gained nothing: its sums in fp32 would go through the caches once for every strip.
#include "matrix.h"
#include "token_logprob.h"

namespace LLAMA2RT_ISA {
namespace {

constexpr int64_t ROWS = 64, STRIP = 512, INNER = 512;
static_assert(ROWS % BLOCK == 0 && STRIP % PANEL == 0 && INNER % (2 * W) == 0);

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A tile's columns cut into strips, none of which is kept in part, and its rows into groups.
struct Pieces {
  Pieces(const LogprobProduct& p, int64_t rows, int64_t columns, int threads)
      : rows(rows),
        columns(columns),
        kept(p.kept_columns),
        // The packed weight of a strip is as large as STRIP columns of INNER, or one panel.
        width(smaller(STRIP, round_up(STRIP * INNER / (p.inner + 1), PANEL))),
        kept_strips(parts(kept, width)),
        strips(kept_strips + parts(columns - kept, width)) {
    // Each group packs the weight anew: no more of them than keep all threads busy to the end.
    int64_t groups = 1;
    while (strips * groups < 4 * threads && rows / groups > 4 * ROWS) groups *= 2;
    group = round_up(parts(rows, groups), ROWS);
  }
  int64_t count() const { return strips * parts(rows, group); }

  const int64_t rows, columns, kept, width, kept_strips, strips;
  int64_t group;
};

struct Piece {
  Piece(const Pieces& of, int64_t item)
      : strip(item % of.strips),
        kept(strip < of.kept_strips),
        begin(kept ? strip * of.width : of.kept + (strip - of.kept_strips) * of.width),
        columns(smaller(of.width, (kept ? of.kept : of.columns) - begin)),
        first(item / of.strips * of.group),
        last(smaller(first + of.group, of.rows)) {}

  // Calls body(row, rows) for up to ROWS rows at a time.
  template <typename Body>
  void for_each_block(Body body) const {
    for (int64_t row = first; row < last; row += ROWS) body(row, smaller(last - row, ROWS));
  }

  const int64_t strip;
  const bool kept;
  const int64_t begin, columns, first, last;
};

// hidden weight^T for a piece, in the memory of one thread.
template <typename T>
struct Logits {
  static constexpr int64_t UNIT = unit<T>();

  Logits(const LogprobProduct& p, const Pieces& pieces, float* scratch)
      : p(p),
        width(pieces.width),
        depth(round_up(p.inner, UNIT * W) / UNIT),
        panels(scratch),
        left(panels + width * depth),
        partial(left + ROWS * INNER / UNIT),
        end(partial + ROWS * width) {}

  static int64_t floats(const LogprobProduct& p, const Pieces& pieces) {
    return Logits(p, pieces, nullptr).end - (float*)nullptr;
  }

  void pack(const Piece& piece) const {
    for (int64_t c = 0; c < piece.columns; c += PANEL)
      pack_panel((const T*)p.weight + (piece.begin + c) * p.weight_stride, p.weight_stride,
                 smaller(piece.columns - c, PANEL), p.inner, panels + c * depth);
  }

  // The logits of a block of the piece that was packed.
  void make(const Piece& piece, int64_t row, int64_t rows, T* to, int64_t stride) const {
    if (p.inner == 0)
      for (int64_t r = 0; r < rows; ++r) memset(to + r * stride, 0, piece.columns * sizeof(T));
    for (int64_t k = 0; k < p.inner; k += INNER) {
      const T* x = (const T*)p.hidden + row * p.hidden_stride + k;
      pack_rows(x, p.hidden_stride, rows, round_up(rows, BLOCK), smaller(p.inner - k, INNER), left,
                INNER / UNIT);
      const int64_t units = smaller(depth - k / UNIT, INNER / UNIT);
      for (int64_t c = 0; c < piece.columns; c += PANEL)
        for (int64_t r = 0; r < rows; r += BLOCK)
          product<UNIT, 2>(units, ByRow{left + r * (INNER / UNIT), INNER / UNIT},
                           panels + c * depth + k / UNIT * PANEL, PANEL, [&](auto& sums) {
            finish(sums, k, partial + r * width + c, to + r * stride + c, stride, rows - r,
                   piece.columns - c);
          });
    }
  }

  // Adds sums to those of the terms before `k`, and rounds them after the last. Unrolled: an index
  // that is no constant would put the sums into memory.
  void finish(Sums<2>& sums, int64_t k, float* partial, T* to, int64_t stride, int64_t rows,
              int64_t columns) const {
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        float* before = partial + i * width + j * W;
        const f32v sum = k > 0 ? load(before) + sums[i][j] : sums[i][j];
        const int64_t left = columns - j * W;
        if (k + INNER < p.inner)
          store(before, sum);
        else if (i < rows && left >= W)
          store(to + i * stride + j * W, sum);
        else if (i < rows && left > 0)
          store(to + i * stride + j * W, sum, Part{left});
      }
  }

  const LogprobProduct& p;
  const int64_t width, depth;
  float *const panels, *const left, *const partial, *const end;
};

template <typename T>
void forward(const TokenLogprob& a, const LogprobProduct& p) {
  const Pieces pieces(p, a.rows, a.columns, a.threads);
  Workspace<> memory(3 * pieces.strips * a.rows);
  auto counts = [&](int64_t strip) {
    return Counts(memory.data + 3 * strip * a.rows, a.rows, a.weighted);
  };
  const int64_t block = ROWS * pieces.width;  // of logits that are not kept
  const int64_t floats = Logits<T>::floats(p, pieces) + block;
  share(pieces.count(), floats, a.threads, [&](int64_t item, float* scratch) {
    const Piece piece(pieces, item);
    const Logits<T> logits(p, pieces, scratch);
    logits.pack(piece);
    piece.for_each_block([&](int64_t row, int64_t rows) {
      T* to = piece.kept ? (T*)p.kept + row * p.kept_stride + piece.begin : (T*)logits.end;
      const int64_t stride = piece.kept ? p.kept_stride : pieces.width;
      logits.make(piece, row, rows, to, stride);
      for (int64_t r = 0; r < rows; ++r)
        count(a, to + r * stride, a.first + piece.begin, piece.columns, row + r,
              counts(piece.strip));
    });
  });
  for (int64_t strip = 0; strip < pieces.strips; ++strip) merge(a, counts(strip));
}

template <typename T>
void backward(const TokenLogprobBackward& a, const LogprobProduct& p) {
  const Pieces pieces(p, a.rows, a.columns, a.threads);
  share(pieces.count(), Logits<T>::floats(p, pieces), a.threads,
        [&](int64_t item, float* scratch) {
    const Piece piece(pieces, item);
    const Logits<T> logits(p, pieces, scratch);
    if (!piece.kept) logits.pack(piece);
    piece.for_each_block([&](int64_t row, int64_t rows) {
      T* to = (T*)a.dlogits + row * a.dlogits_stride + piece.begin;
      const T* from = piece.kept ? (const T*)p.kept + row * p.kept_stride + piece.begin : to;
      const int64_t stride = piece.kept ? p.kept_stride : a.dlogits_stride;
      if (!piece.kept) logits.make(piece, row, rows, to, stride);
      for (int64_t r = 0; r < rows; ++r)
        differentiate(a, from + r * stride, to + r * a.dlogits_stride, a.first + piece.begin,
                      piece.columns, row + r);
    });
  });
}

}  // namespace

void token_logprob_from(const TokenLogprob& a, const LogprobProduct& p) {
  by_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a, p); });
}
void token_logprob_backward_from(const TokenLogprobBackward& a, const LogprobProduct& p) {
  by_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a, p); });
}

}  // namespace LLAMA2RT_ISA

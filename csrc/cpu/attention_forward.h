// Attention of many queries, with grouped queries and an online softmax (arXiv:2205.14135), over keys
// and values that lie token by token or in pages.
//
// Scores are formed transposed: a row is a key, lanes are queries. The softmax then needs no sums
// across lanes, its weights come out of registers in the order in which the second product reads
// them, and keys and values are packed without being transposed.
//
// A work item is some queries of one document, for all query heads of one key head. It packs
// each block of keys and values once and holds it against one panel of queries after the other.
#pragma once

#include <math.h>

#include "attention.h"

namespace LLAMA2RT_ISA {

// One head of some tokens in a row.
template <typename T>
struct Tokens {
  const T* data;
  int64_t stride;
};

// `Cache` says where keys or values lie: `tokens(document, head, first, count, copy)` are those of
// tokens [first, first + count) of a document, put together in `copy` where they lie apart.
template <typename T, typename Cache>
struct Forward {
  static constexpr int64_t UNIT = unit<T>();
  // Per block, whose packed form stays in the second-level cache.
  static constexpr int64_t KEYS = 128;
  // Per work item, over all heads of a group: repays packing.
  static constexpr int64_t QUERIES = 512;

  Forward(const Attention& a, const Cache& k, const Cache& v)
      : a(a), k(k), v(v), group(a.heads / a.kv_heads), width(round_up(a.head_dim, W * UNIT)),
        units((a.head_dim + UNIT - 1) / UNIT),
        queries(QUERIES / group > PANEL ? QUERIES / group / PANEL * PANEL : PANEL) {}

  // One panel of queries: packed queries, acc, row_max and row_sum.
  int64_t panel_floats() const { return (width / UNIT + width + 2) * PANEL; }
  int64_t floats(int64_t longest) const {
    const int64_t panels = ((longest < queries ? longest : queries) + PANEL - 1) / PANEL;
    return copy_floats() + KEYS * (2 * width / UNIT + 2 * PANEL) + group * panels * panel_floats();
  }
  int64_t copy_floats() const {
    return round_up(Cache::COPIES ? KEYS * a.head_dim * sizeof(T) / sizeof(float) : 0, W);
  }

  template <int VECTORS>
  void attend(float* panel, int64_t rows, const Mask& mask, const float* keys, const float* values,
              float* scores, float* weights) const {
    float* acc = panel + width / UNIT * PANEL;
    float* row_max = acc + width * PANEL;
    float* row_sum = row_max + PANEL;
    f32v new_max[VECTORS], shift[VECTORS], decay[VECTORS], new_sum[VECTORS];
    for (int j = 0; j < VECTORS; ++j) new_max[j] = load(row_max + j * W);
    for (int64_t r = 0; r < rows; r += BLOCK)
      product<UNIT, VECTORS>(
          units, ByRow{keys + r * width / UNIT, width / UNIT}, panel, PANEL,
          [&](auto& s) {
            for (int i = 0; i < BLOCK; ++i)
              for (int j = 0; j < VECTORS; ++j) s[i][j] *= a.scale;
            if (mask.hides(r))
              for (int i = 0; i < BLOCK; ++i)
                for (int j = 0; j < VECTORS; ++j)
                  s[i][j] = mask.shows(r + i, j) ? s[i][j] : broadcast(-INFINITY);
            for (int i = 0; i < BLOCK; ++i)
              for (int j = 0; j < VECTORS; ++j) {
                new_max[j] = s[i][j] > new_max[j] ? s[i][j] : new_max[j];
                store(scores + (r + i) * PANEL + j * W, s[i][j]);
              }
          });
    for (int j = 0; j < VECTORS; ++j) {
      // Where all was minus infinity there is no maximum to subtract.
      shift[j] = new_max[j] == broadcast(-INFINITY) ? f32v{} : new_max[j];
      decay[j] = exp2((load(row_max + j * W) - shift[j]) * LOG2E);
      new_sum[j] = f32v{};
    }
    for (int64_t r = 0; r < rows; r += 2)
      for (int j = 0; j < VECTORS; ++j) {
        const f32v first = exp2((load(scores + r * PANEL + j * W) - shift[j]) * LOG2E);
        const f32v second = exp2((load(scores + (r + 1) * PANEL + j * W) - shift[j]) * LOG2E);
        new_sum[j] += first + second;
        store_two_rows<UNIT>(weights + j * W, PANEL, r, first, second);
      }
    for (int j = 0; j < VECTORS; ++j) {
      store(row_max + j * W, new_max[j]);
      store(row_sum + j * W, load(row_sum + j * W) * decay[j] + new_sum[j]);
    }
    add_product<UNIT, VECTORS>(round_up(a.head_dim, BLOCK), rows / UNIT, ByColumn{values, width},
                               weights, PANEL, acc, PANEL,
                               [&](f32v c, int j) { return c * decay[j]; });
  }

  void run(const WorkItem& item, int64_t kv_head, float* scratch) const {
    const Document document(a, item.document);
    const int64_t n = a.head_dim;
    T* copy = (T*)scratch;
    float* keys = scratch + copy_floats();
    float* values = keys + KEYS * width / UNIT;
    float* scores = values + KEYS * width / UNIT;
    float* weights = scores + KEYS * PANEL;
    float* panels = weights + KEYS * PANEL;

    auto for_each_panel = [&](auto body) {
      float* panel = panels;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t q = item.q_begin; q < item.q_end; q += PANEL, panel += panel_floats())
          body(head, q, item.q_end - q < PANEL ? item.q_end - q : PANEL, panel);
    };
    for_each_panel([&](int64_t head, int64_t q, int64_t count, float* panel) {
      const int64_t token = document.q_begin + q;
      pack_panel(head_of<T>(a.q, token, head), a.q.token_stride, count, n, panel);
      float* acc = panel + width / UNIT * PANEL;
      memset(acc, 0, width * PANEL * sizeof(float));
      for (int64_t i = 0; i < PANEL; ++i) acc[width * PANEL + i] = -INFINITY;
      memset(acc + (width + 1) * PANEL, 0, PANEL * sizeof(float));
    });
    const int64_t seen = document.seen(item.q_end - 1);
    for (int64_t key = 0; key < seen; key += KEYS) {
      const int64_t count = seen - key < KEYS ? seen - key : KEYS, padded = round_up(count, BLOCK);
      const Tokens<T> k_at = k.tokens(item.document, kv_head, key, count, copy);
      pack_rows(k_at.data, k_at.stride, count, padded, n, keys, width / UNIT);
      const Tokens<T> v_at = v.tokens(item.document, kv_head, key, count, copy);
      pack_columns(v_at.data, v_at.stride, count, padded, n, values, width);
      for_each_panel([&](int64_t, int64_t q, int64_t queries, float* panel) {
        int64_t rows = round_up(document.seen(q + queries - 1) - key, BLOCK);
        if (rows <= 0) return;
        if (rows > padded) rows = padded;
        const Mask mask(document, q, key);
        if (queries > W)
          attend<2>(panel, rows, mask, keys, values, scores, weights);
        else
          attend<1>(panel, rows, mask, keys, values, scores, weights);
      });
    }
    for_each_panel([&](int64_t head, int64_t q, int64_t count, float* panel) {
      const int64_t token = document.q_begin + q;
      float* acc = panel + width / UNIT * PANEL;
      float* row_max = acc + width * PANEL;
      float* row_sum = row_max + PANEL;
      float* lse = a.lse + head * offset_at(a.q_offsets, a.documents) + token;
      for (int64_t i = 0; i < PANEL; ++i) {
        const bool masked = row_max[i] == -INFINITY;
        if (a.lse && i < count) lse[i] = masked ? -INFINITY : row_max[i] + logf(row_sum[i]);
        row_sum[i] = masked ? 0.0f : 1.0f / row_sum[i];
      }
      unpack_panel(acc, count, n, row_sum, (T*)a.out + (token * a.heads + head) * n, a.heads * n);
    });
  }

  const Attention& a;
  const Cache k, v;
  const int64_t group, width, units, queries;
};

// Of the documents that `chosen` says, by their number of queries.
template <typename T, typename Cache, typename Chosen>
inline void forward(const Attention& a, const Cache& k, const Cache& v, Chosen chosen) {
  const Forward<T, Cache> work(a, k, v);
  int64_t count = 0, longest = 0;
  for (int64_t i = 0; i < a.documents; ++i) {
    const int64_t queries = Document(a, i).queries;
    if (!chosen(queries)) continue;
    count += (queries + work.queries - 1) / work.queries;
    if (queries > longest) longest = queries;
  }
  Workspace<WorkItem> items(count);
  WorkItem* next = items.data;
  for (int64_t i = 0; i < a.documents; ++i) {
    const Document document(a, i);
    if (!chosen(document.queries)) continue;
    for (int64_t q = 0; q < document.queries; q += work.queries) {
      const int64_t end = q + work.queries < document.queries ? q + work.queries : document.queries;
      *next++ = {i, q, end, 0, document.keys, (end - q) * (document.seen((q + end) / 2) + 1)};
    }
  }
  share(a, items.data, count, work.floats(longest),
        [&](const WorkItem& item, int64_t kv_head, float* scratch) {
          work.run(item, kv_head, scratch);
        });
}

}  // namespace LLAMA2RT_ISA

// The gradient of attention, from the saved log-sum-exp (arXiv:2205.14135, appendix B).
//
//   p = exp(scale * q k - lse)          dv = sum over queries of p dout
//   dp = dout v                         ds = p * (dp - delta),  delta = dout . out
//   dq = scale * sum over keys of ds k  dk = scale * sum over queries of ds q
//
// Scores are formed transposed, as in the forward pass: a row is a key, lanes are queries. BLOCK
// rows by one panel of p and ds are finished at a time, while they are in the first-level cache,
// and written in the two orders that the other three products read.
//
// A item of work is some queries of one document against some of its keys, for one key head. One
// that holds all keys of a query can write its dq, one that holds all queries of a key its dk and
// dv; usually a item is a whole document and writes all three.
#include "attention.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

constexpr int64_t KEYS = 64;  // a tile is KEYS by QUERIES: p, ds and what is packed of
constexpr int64_t QUERIES = 128;  // both stay in the second-level cache
constexpr int64_t SPLIT = 256;    // keys or queries per item where a document is divided

template <typename T>
struct Backward {
  static constexpr int64_t UNIT = unit<T>();

  explicit Backward(const AttentionBackward& b)
      : a(b), b(b), group(a.heads / a.kv_heads), n(a.head_dim),
        width(round_up(n, W * UNIT)), units((n + UNIT - 1) / UNIT) {}

  struct Scratch {
    // Of the block of keys in hand; by row as [keys, units], by column as [keys / UNIT, n].
    float *keys_by_row, *keys_by_column, *values_by_row;
    // Of a tile: [keys, queries / UNIT] by row, [keys / UNIT, queries] by column.
    float *p, *ds, *ds_by_column;
    // Of all queries of the item, for one head. A panel is [units, PANEL], of dq [n, PANEL].
    float *q_panels, *dout_panels, *dq_panels, *q_by_column, *dout_by_column, *lse, *delta;
    float *dk, *dv;  // of all keys of the item, [keys, n]
  };

  // Divides the memory from `floats` on among what so many queries and keys need: how many floats.
  int64_t layout(Scratch& s, float* floats, int64_t queries, int64_t keys) const {
    int64_t used = 0;
    auto take = [&](int64_t count) {
      used += count;
      return floats + used - count;
    };
    queries = round_up(queries, PANEL);
    s.keys_by_row = take(KEYS * width / UNIT);
    s.values_by_row = take(KEYS * width / UNIT);
    s.keys_by_column = UNIT == 1 ? s.keys_by_row : take(KEYS * width / UNIT);
    s.p = take(KEYS * QUERIES / UNIT);
    s.ds = take(KEYS * QUERIES / UNIT);
    s.ds_by_column = UNIT == 1 ? s.ds : take(KEYS * QUERIES / UNIT);
    s.q_panels = take(queries * width / UNIT);
    s.dout_panels = take(queries * width / UNIT);
    s.dq_panels = take(queries * width);
    s.q_by_column = take(queries * width / UNIT);
    s.dout_by_column = take(queries * width / UNIT);
    s.lse = take(queries);
    s.delta = take(queries);
    s.dk = take(round_up(keys, BLOCK) * width);
    s.dv = take(round_up(keys, BLOCK) * width);
    return used;
  }

  void pack_keys(const Scratch& s, int64_t token, int64_t count, int64_t kv_head) const {
    const T *k = head_of<T>(a.k, token, kv_head), *v = head_of<T>(a.v, token, kv_head);
    const int64_t padded = round_up(count, BLOCK);
    pack_rows(k, a.k.token_stride, count, padded, n, s.keys_by_row, width / UNIT);
    pack_rows(v, a.v.token_stride, count, padded, n, s.values_by_row, width / UNIT);
    if (UNIT > 1) pack_columns(k, a.k.token_stride, count, padded, n, s.keys_by_column, width);
  }

  void pack_queries(const Scratch& s, int64_t token, int64_t count, int64_t head) const {
    const T *q = head_of<T>(a.q, token, head), *dout = head_of<T>(b.dout, token, head);
    for (int64_t i = 0; i < count; i += PANEL) {
      const int64_t rows = count - i < PANEL ? count - i : PANEL, at = i * width / UNIT;
      pack_panel(q + i * a.q.token_stride, a.q.token_stride, rows, n, s.q_panels + at);
      pack_panel(dout + i * b.dout.token_stride, b.dout.token_stride, rows, n, s.dout_panels + at);
    }
    const int64_t padded = round_up(count, W);
    pack_columns(q, a.q.token_stride, count, padded, n, s.q_by_column, width);
    pack_columns(dout, b.dout.token_stride, count, padded, n, s.dout_by_column, width);
    const float* lse = a.lse + head * offset_at(a.q_offsets, a.documents) + token;
    for (int64_t i = 0; i < padded; ++i) {
      // A padding query, or one that sees no key: infinity makes each of its p 0.
      s.lse[i] = i < count && lse[i] != -INFINITY ? lse[i] : INFINITY;
      f32v acc = {};
      if (i < count) {
        const T* out = (const T*)a.out + ((token + i) * a.heads + head) * n;
        for_each_vector(n, [&](int64_t d, auto lanes) {
          acc += load(dout + i * b.dout.token_stride + d, lanes) * load(out + d, lanes);
        });
      }
      s.delta[i] = sum(acc);
    }
  }

  // p and ds of `rows` keys against the VECTORS * W queries from `query` on, which lie from column
  // `column` on in the tile.
  template <int VECTORS>
  void weigh(const Scratch& s, int64_t rows, int64_t query, int64_t column,
             const Mask& mask) const {
    const float* q = s.q_panels + query * width / UNIT;
    const float* dout = s.dout_panels + query * width / UNIT;
    f32v lse[VECTORS], delta[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      lse[j] = load(s.lse + query + j * W);
      delta[j] = load(s.delta + query + j * W);
    }
    for (int64_t r = 0; r < rows; r += BLOCK) {
      float scores[BLOCK * PANEL];
      product<UNIT, VECTORS>(units, ByRow{s.keys_by_row + r * width / UNIT, width / UNIT}, q, PANEL,
                             [&](auto& sums) {
                               for (int i = 0; i < BLOCK; ++i)
                                 for (int j = 0; j < VECTORS; ++j)
                                   store(scores + i * PANEL + j * W, sums[i][j]);
                             });
      const bool hides = mask.hides(r);
      product<UNIT, VECTORS>(
          units, ByRow{s.values_by_row + r * width / UNIT, width / UNIT}, dout, PANEL,
          [&](auto& dp) {
#pragma GCC unroll 8
            for (int i = 0; i < BLOCK; i += 2)
#pragma GCC unroll 2
              for (int j = 0; j < VECTORS; ++j) {
                f32v p[2], ds[2];
#pragma GCC unroll 2
                for (int two = 0; two < 2; ++two) {
                  const f32v score = load(scores + (i + two) * PANEL + j * W);
                  p[two] = exp2((score * a.scale - lse[j]) * LOG2E);
                  ds[two] = p[two] * (dp[i + two][j] - delta[j]);
                  if (hides) {
                    const i32v shows = mask.shows(r + i + two, j);
                    p[two] = shows ? p[two] : f32v{};
                    ds[two] = shows ? ds[two] : f32v{};
                  }
                  store_row(s.p, r + i + two, column + j * W, p[two]);
                  store_row(s.ds, r + i + two, column + j * W, ds[two]);
                }
                if (UNIT > 1)
                  store_two_rows<UNIT>(s.ds_by_column + column + j * W, QUERIES, r + i, ds[0],
                                       ds[1]);
              }
          });
    }
  }

  static void store_row(float* tile, int64_t row, int64_t column, f32v x) {
    if (UNIT == 1)
      store(tile + row * QUERIES + column, x);
    else
      store((bf16*)tile + row * QUERIES + column, x);
  }

  // BLOCK rows of a tile's p or ds, from column `column` on, times dout or q, added to dv or dk.
  void add_rows(const float* tile, int64_t row, int64_t column, int64_t columns,
                const float* by_column, float* gradient) const {
    const ByRow left{tile + (row * QUERIES + column) / UNIT, QUERIES / UNIT};
    for (int64_t i = 0; i < n; i += PANEL) {
      const float* right = by_column + column / UNIT * width + i;
      float* to = gradient + row * width + i;
      if (n - i > W)
        add_product<UNIT, 2>(BLOCK, columns / UNIT, left, right, width, to, width, Keep());
      else
        add_product<UNIT, 1>(BLOCK, columns / UNIT, left, right, width, to, width, Keep());
    }
  }

  // The panel of queries from `query` on, at `column` of the tile, against `rows` packed keys.
  template <int VECTORS>
  void visit_panel(const Scratch& s, int64_t rows, int64_t query, int64_t column, const Mask& mask,
                   bool writes_dq) const {
    weigh<VECTORS>(s, rows, query, column, mask);
    if (writes_dq)
      add_product<UNIT, VECTORS>(round_up(n, BLOCK), rows / UNIT, ByColumn{s.keys_by_column, width},
                                 s.ds_by_column + column, QUERIES, s.dq_panels + query * width,
                                 PANEL, Keep());
  }

  void run(const WorkItem& item, int64_t kv_head, float* floats) const {
    const Document document(a, item.document);
    const bool writes_dq = item.k_begin == 0 && item.k_end == document.keys;
    const bool writes_dkv = item.q_begin == 0 && item.q_end == document.queries;
    // What no pair of the item needs is left out; tiles stay aligned with the document.
    const int64_t first = document.first_seeing(item.k_begin) / QUERIES * QUERIES;
    const int64_t q_begin = writes_dq || first < item.q_begin ? item.q_begin : first;
    const int64_t seen = item.q_end > 0 ? document.seen(item.q_end - 1) : 0;
    const int64_t k_end = seen < item.k_end ? seen : item.k_end;
    const int64_t keys = item.k_end - item.k_begin;
    Scratch s;
    layout(s, floats, item.q_end - q_begin, keys);
    memset(s.dk, 0, round_up(keys, BLOCK) * width * sizeof(float));
    memset(s.dv, 0, round_up(keys, BLOCK) * width * sizeof(float));

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      pack_queries(s, document.q_begin + q_begin, item.q_end - q_begin, head);
      if (writes_dq)
        memset(s.dq_panels, 0, round_up(item.q_end - q_begin, PANEL) * width * sizeof(float));
      for (int64_t key = item.k_begin; key < k_end; key += KEYS) {
        const int64_t count = k_end - key < KEYS ? k_end - key : KEYS;
        pack_keys(s, document.k_begin + key, count, kv_head);
        int64_t query = document.first_seeing(key) / QUERIES * QUERIES;
        for (query = query < q_begin ? q_begin : query; query < item.q_end; query += QUERIES) {
          const int64_t end = query + QUERIES < item.q_end ? query + QUERIES : item.q_end;
          for (int64_t q = query; q < end; q += PANEL) {
            int64_t rows = document.seen((q + PANEL < end ? q + PANEL : end) - 1) - key;
            if (rows <= 0) continue;
            rows = round_up(rows < count ? rows : count, BLOCK);
            const Mask mask(document, q, key);
            if (end - q > W)
              visit_panel<2>(s, rows, q - q_begin, q - query, mask, writes_dq);
            else
              visit_panel<1>(s, rows, q - q_begin, q - query, mask, writes_dq);
          }
          if (!writes_dkv) continue;
          for (int64_t r = 0; r < count; r += BLOCK) {
            int64_t column = document.first_seeing(key + r) - query;
            if (column >= end - query) break;
            column = column < 0 ? 0 : column / PANEL * PANEL;
            const int64_t columns = round_up(end - query - column, W), row = key - item.k_begin;
            const int64_t by_column = (query - q_begin) / UNIT * width;
            add_rows(s.p, r, column, columns, s.dout_by_column + by_column, s.dv + row * width);
            add_rows(s.ds, r, column, columns, s.q_by_column + by_column, s.dk + row * width);
          }
        }
      }
      if (writes_dq) {
        float scales[PANEL];
        for (int64_t i = 0; i < PANEL; ++i) scales[i] = a.scale;
        for (int64_t q = q_begin; q < item.q_end; q += PANEL) {
          const int64_t rows = item.q_end - q < PANEL ? item.q_end - q : PANEL;
          unpack_panel(s.dq_panels + (q - q_begin) * width, rows, n, scales,
                       (T*)b.dq + ((document.q_begin + q) * a.heads + head) * n, a.heads * n);
        }
      }
    }
    if (writes_dkv)
      for (int64_t i = 0; i < keys; ++i) {
        const int64_t at = ((document.k_begin + item.k_begin + i) * a.kv_heads + kv_head) * n;
        for_each_vector(n, [&](int64_t d, auto lanes) {
          store((T*)b.dk + at + d, load(s.dk + i * width + d) * a.scale, lanes);
          store((T*)b.dv + at + d, load(s.dv + i * width + d), lanes);
        });
      }
  }

  const Attention& a;
  const AttentionBackward& b;
  const int64_t group, n, width, units;
};

// Pairs of query and key that see each other, about.
int64_t pairs(const Document& document, int64_t q_begin, int64_t q_end, int64_t k_begin,
              int64_t k_end) {
  int64_t total = 0;
  for (int64_t q = q_begin; q < q_end; q += SPLIT) {
    const int64_t end = q + SPLIT < q_end ? q + SPLIT : q_end;
    int64_t keys = document.seen((q + end) / 2);
    keys = (keys < k_end ? keys : k_end) - k_begin;
    if (keys > 0) total += (end - q) * keys;
  }
  return total + 1;
}

template <typename T>
void backward(const AttentionBackward& b) {
  const Attention& a = b;
  const Backward<T> work(b);
  int64_t total = 0, most = 0, queries = 0, keys = 0;
  for (int64_t i = 0; i < a.documents; ++i) {
    const Document document(a, i);
    total += pairs(document, 0, document.queries, 0, document.keys) * a.kv_heads;
    most += 1 + (document.queries + SPLIT - 1) / SPLIT + (document.keys + SPLIT - 1) / SPLIT;
    if (document.queries > queries) queries = document.queries;
    if (document.keys > keys) keys = document.keys;
  }
  Workspace<WorkItem> items(most);
  int64_t count = 0;
  auto add = [&](const Document& document, int64_t i, int64_t q_begin, int64_t q_end,
                 int64_t k_begin, int64_t k_end) {
    items.data[count++] = {i, q_begin, q_end, k_begin, k_end,
                            pairs(document, q_begin, q_end, k_begin, k_end)};
  };
  for (int64_t i = 0; i < a.documents; ++i) {
    const Document document(a, i);
    // Dividing a document costs 7 products in place of 5, which a thread without work repays. The
    // sums run in the same order either way, so the results have the same bits.
    const double share = (double)pairs(document, 0, document.queries, 0, document.keys) / total;
    const bool divided =
        share * a.threads > 1.4 && document.queries > SPLIT && document.keys > SPLIT;
    if (!divided) {
      add(document, i, 0, document.queries, 0, document.keys);
      continue;
    }
    for (int64_t q = 0; q < document.queries; q += SPLIT)
      add(document, i, q, q + SPLIT < document.queries ? q + SPLIT : document.queries, 0,
          document.keys);
    for (int64_t k = 0; k < document.keys; k += SPLIT)
      add(document, i, 0, document.queries, k,
          k + SPLIT < document.keys ? k + SPLIT : document.keys);
  }
  typename Backward<T>::Scratch unused;
  share(a, items.data, count, work.layout(unused, nullptr, queries, keys),
        [&](const WorkItem& item, int64_t kv_head, float* scratch) {
          work.run(item, kv_head, scratch);
        });
}

}  // namespace

void attention_backward(const AttentionBackward& b) {
  by_dtype(b.dtype, [&](auto t) { backward<decltype(t)>(b); });
}

}  // namespace LLAMA2RT_ISA

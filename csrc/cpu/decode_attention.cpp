// Attention of one new token per sequence over a paged KV cache, with grouped queries.
//
// The cache is read once, a tile of tokens at a time and all their heads one after another, which is
// the order it lies in: head by head, each page of memory would be visited once per head for a few
// lines. A vector of keys or values is converted once for several query heads. Each query head keeps
// a running maximum, sum and output (online softmax, arXiv:1805.02867). Everything is fp32.
#include "matrix.h"
#include "parallel.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

constexpr int64_t TILE = 16;  // cached tokens per step of the softmax
static_assert(TILE % W == 0);

// What one thread keeps of some query heads; rows are padded to whole vectors with zeros.
struct Heads {
  Heads(float* scratch, int64_t heads, int64_t n)
      : stride(round_up(n, W)),
        queries(scratch),
        outputs(queries + heads * stride),
        maxima(outputs + heads * stride),
        sums(maxima + heads) {}
  static int64_t floats(int64_t heads, int64_t n) { return 2 * heads * (round_up(n, W) + 1); }

  Heads from(int64_t head) const {
    Heads later = *this;
    later.queries += head * stride;
    later.outputs += head * stride;
    later.maxima += head;
    later.sums += head;
    return later;
  }

  int64_t stride;
  float *queries, *outputs, *maxima, *sums;
};

// The keys and values of a tile of tokens, for one KV head after another.
template <typename T>
struct Rows {
  Rows(const DecodeAttention& a, const int32_t* pages, int64_t first, int64_t length)
      : count(length - first < TILE ? length - first : TILE) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t page = pages[(first + t) / a.page_size], slot = (first + t) % a.page_size;
      k[t] = (const T*)a.k_cache + page * a.k_page_stride + slot * a.k_token_stride;
      v[t] = (const T*)a.v_cache + page * a.v_page_stride + slot * a.v_token_stride;
    }
  }
  Rows of(const DecodeAttention& a, int64_t kv_head) const {
    Rows rows = *this;
    for (int64_t t = 0; t < count; ++t) {
      rows.k[t] += kv_head * a.k_head_stride;
      rows.v[t] += kv_head * a.v_head_stride;
    }
    return rows;
  }
  // The processor cannot guess where the next tile is. One head's rows at a time, while those of the
  // same head of this tile are used: a whole tile of all heads would push them out of the cache.
  void prefetch(int64_t n) const {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) {
        __builtin_prefetch(k[t] + i);
        __builtin_prefetch(v[t] + i);
      }
  }

  int64_t count;
  const T *k[TILE], *v[TILE];
};

// GROUP query heads over the tokens of a tile.
template <int GROUP, typename T>
void attend(const Heads& heads, int64_t n, const Rows<T>& rows) {
  const int64_t count = rows.count;
  float scores[GROUP][TILE], decay[GROUP];
  for (int64_t first = 0; first < TILE; first += W) {
    f32v dots[GROUP][W];
    for (int64_t t = 0; t < W; ++t) {
      f32v total[GROUP] = {};
      if (first + t < count)
        for_each_vector(n, [&](int64_t i, auto lanes) {
          const f32v key = load(rows.k[first + t] + i, lanes);
#pragma GCC unroll 4
          for (int g = 0; g < GROUP; ++g)
            total[g] += load(heads.queries + g * heads.stride + i) * key;
        });
#pragma GCC unroll 4
      for (int g = 0; g < GROUP; ++g) dots[g][t] = total[g];
    }
    for (int g = 0; g < GROUP; ++g) store(scores[g] + first, sums_of_rows(dots[g]));
  }
  for (int g = 0; g < GROUP; ++g) {
    float peak = heads.maxima[g];
    for (int64_t t = 0; t < count; ++t) peak = maximum(peak, scores[g][t]);
    for (int64_t t = count; t < TILE; ++t) scores[g][t] = -INFINITY;
    // A row of minus infinities has no maximum to subtract; its weights must be 0, not NaN.
    const float shift = peak == -INFINITY ? 0.0f : peak;
    decay[g] = expf(heads.maxima[g] - shift);
    f32v total = {};
    for (int64_t t = 0; t < TILE; t += W) {
      f32v s = load(scores[g] + t);
      f32v p = exp(s - shift);
      p = s == broadcast(-INFINITY) ? f32v{} : p;
      store(scores[g] + t, p);
      total += p;
    }
    heads.sums[g] = heads.sums[g] * decay[g] + sum(total);
    heads.maxima[g] = peak;
  }
  for_each_vector(n, [&](int64_t i, auto lanes) {
    f32v out[GROUP];
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; ++g)
      out[g] = load(heads.outputs + g * heads.stride + i) * decay[g];
    for (int64_t t = 0; t < count; ++t) {
      const f32v value = load(rows.v[t] + i, lanes);
#pragma GCC unroll 4
      for (int g = 0; g < GROUP; ++g) out[g] += value * scores[g][t];
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; ++g) store(heads.outputs + g * heads.stride + i, out[g]);
  });
}

// KV heads [begin, end) of one sequence.
template <typename T>
void some_heads(const DecodeAttention& a, int64_t sequence, int64_t begin, int64_t end,
                float* scratch) {
  const int64_t n = a.head_dim, group = a.heads / a.kv_heads, length = a.lengths[sequence];
  const int64_t first = begin * group, count = (end - begin) * group;
  const int32_t* pages = a.block_table + sequence * a.block_table_stride;
  const Heads all(scratch, count, n);
  for (int64_t head = 0; head < count; ++head) {
    const Heads one = all.from(head);
    const T* q = (const T*)a.q + sequence * a.q_sequence_stride + (first + head) * a.q_head_stride;
    memset(one.queries, 0, one.stride * sizeof(float));
    memset(one.outputs, 0, one.stride * sizeof(float));
    for_each_vector(n, [&](int64_t i, auto lanes) {
      store(one.queries + i, load(q + i, lanes) * a.scale, lanes);
    });
    *one.maxima = -INFINITY;
    *one.sums = 0.0f;
  }

  Rows<T> next(a, pages, 0, length);
  for (int64_t token = 0; token < length; token += TILE) {
    const Rows<T> here = next;
    next = Rows<T>(a, pages, token + TILE, length);
    for (int64_t kv_head = begin; kv_head < end; ++kv_head) {
      next.of(a, kv_head).prefetch(n);
      const Rows<T> rows = here.of(a, kv_head);
      for (int64_t done = 0, left = group; left > 0;) {
        const Heads some = all.from((kv_head - begin) * group + done);
        const int64_t size = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (size == 4) attend<4>(some, n, rows);
        if (size == 2) attend<2>(some, n, rows);
        if (size == 1) attend<1>(some, n, rows);
        done += size;
        left -= size;
      }
    }
  }

  for (int64_t head = 0; head < count; ++head) {
    const Heads one = all.from(head);
    T* out = (T*)a.out + (sequence * a.heads + first + head) * n;
    const float inverse = length > 0 ? 1.0f / *one.sums : 0.0f;
    for_each_vector(n, [&](int64_t i, auto lanes) {
      store(out + i, load(one.outputs + i, lanes) * inverse, lanes);
    });
  }
}

template <typename T>
void decode(const DecodeAttention& a) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t tokens = 0;
  for (int64_t i = 0; i < a.sequences; ++i) tokens += a.lengths[i];
  // As many KV heads of a sequence together as leave each thread a piece of work or two.
  int64_t together = a.kv_heads;
  while (together > 1 && a.sequences * (a.kv_heads / together) < 2 * a.threads)
    together = (together + 1) / 2;
  const int64_t pieces = (a.kv_heads + together - 1) / together, items = a.sequences * pieces;
  parallel(items, tokens * a.heads * a.head_dim, a.threads, [&](int64_t begin, int64_t end) {
    Workspace<> scratch(Heads::floats(together * group, a.head_dim));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % pieces * together, last = first + together;
      some_heads<T>(a, item / pieces, first, last < a.kv_heads ? last : a.kv_heads, scratch.data);
    }
  });
}

}  // namespace

void decode_attention(const DecodeAttention& a) {
  for (int64_t i = 0; i < a.sequences; ++i) {
    const int64_t length = a.lengths[i], used = (length + a.page_size - 1) / a.page_size;
    require(0 <= length && used <= a.block_table_columns,
            "lengths: a value is negative or beyond the pages of its row of block_table");
    for (int64_t j = 0; j < used; ++j) {
      const int32_t page = a.block_table[i * a.block_table_stride + j];
      require(0 <= page && page < a.pages, "block_table: a page number lies outside the caches");
    }
  }
  by_dtype(a.dtype, [&](auto t) { decode<decltype(t)>(a); });
}

}  // namespace LLAMA2RT_ISA

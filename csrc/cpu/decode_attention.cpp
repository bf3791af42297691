// Attention of one new token per sequence over a paged KV cache, with grouped queries.
//
// What counts is the speed at which the cache is read, once, from memory. So a thread takes all KV
// heads of a sequence together, a few tokens at a time: the order in which the cache lies. The
// processor does not guess well enough what comes next in it, so each step asks, between its
// products, for the same heads of tokens further on. A tile of tokens has its scores, their softmax
// (online, arXiv:1805.02867) and then its values; a key or value serves several query heads at once.
// Everything but the products of bf16 with bf16 is fp32.
#include "matrix.h"
#include "parallel.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

constexpr int HEADS = 4;         // query heads of a step
constexpr int ROWS = W / HEADS;  // cached tokens of a step: its scores fill a vector
// Chosen by trials on Zen 5: tokens of one softmax, and from the tokens in use to those that are
// asked for.
constexpr int64_t TILE = 32, AHEAD = 8;
static_assert(TILE % ROWS == 0);

// What a thread keeps of the query heads it works on, `count` of one sequence. Rows are padded to
// whole vectors, heads to whole steps and, being lanes of the softmax, to vectors.
struct QueryHeads {
  QueryHeads(float* scratch, int64_t count, int64_t n)
      : count(count),
        n(n),
        stride(row_floats(n)),
        lanes(round_up(count, W)),
        queries(scratch),
        acc(queries + lanes * stride),
        scores(acc + lanes * stride),
        row_max(scores + TILE * lanes),
        row_sum(row_max + lanes),
        decay(row_sum + lanes) {}
  static int64_t row_floats(int64_t n) { return round_up(n, W); }
  static int64_t floats(int64_t count, int64_t n) {
    return (2 * row_floats(n) + TILE + 3) * round_up(count, W);
  }

  int64_t count, n, stride, lanes;
  float *queries, *acc;  // [lanes, stride], queries in units
  float* scores;         // [TILE, lanes], unscaled; the softmax makes weights of them
  // [lanes]; decay is what a tile multiplies the tiles before it by.
  float *row_max, *row_sum, *decay;
};

int64_t length_of(const DecodeAttention& a, int64_t sequence) {
  return ((const int32_t*)a.lengths.data)[sequence];
}
const int32_t* pages_of(const DecodeAttention& a, int64_t sequence) {
  return (const int32_t*)a.block_table.data + sequence * a.block_table_stride;
}

// Where the KV heads of each token begin, in a tile and AHEAD tokens beyond it.
template <typename T>
struct Rows {
  Rows(const T* cache, const Pages& of, int64_t page_size, const int32_t* pages, int64_t first,
       int64_t length) {
    int64_t page = first / page_size, slot = first % page_size;
    for (int64_t t = 0; t < TILE + AHEAD; ++t) {
      at[t] = cache + pages[page] * of.page_stride + slot * of.token_stride;
      if (first + t + 1 >= length) continue;  // the last token stands for those beyond it
      if (++slot < page_size) continue;
      slot = 0;
      ++page;
    }
  }
  const T* at[TILE + AHEAD];
};

// The KV heads of a step, for all of its rows; SHARE query heads in a row have one in common.
template <int SHARE>
struct KvHeads {
  static constexpr int COUNT = HEADS / SHARE;
  KvHeads(const DecodeAttention& a, const QueryHeads& heads, int64_t head, int64_t head_stride) {
    for (int j = 0; j < COUNT; ++j) {
      // Padding has no KV head; that of the last head will do.
      const int64_t query = head + j * SHARE < heads.count ? head + j * SHARE : heads.count - 1;
      offset[j] = query / (a.heads / a.kv_heads) * head_stride;
    }
  }
  int64_t offset[COUNT];
};

// Scores of ROWS tokens.
template <int SHARE, typename T>
void score(const DecodeAttention& a, const QueryHeads& heads, const T* const* keys, float* scores) {
  constexpr int64_t UNIT = unit<T>();
  for (int64_t head = 0; head < heads.count; head += HEADS) {
    const KvHeads<SHARE> kv(a, heads, head, a.k_cache.head_stride);
    const float* queries = heads.queries + head * heads.stride;
    f32v dots[W] = {};
    for (int64_t i = 0; i < heads.n; i += UNIT * W) {
      f32v query[HEADS];
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) query[h] = load(queries + h * heads.stride + i / UNIT);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kv.COUNT; ++j) {
          __builtin_prefetch(keys[r + AHEAD] + kv.offset[j] + i);
          const f32v key = load_units(keys[r] + kv.offset[j] + i, heads.n - i);
#pragma GCC unroll 4
          for (int h = j * SHARE; h < (j + 1) * SHARE; ++h)
            dots[r * HEADS + h] = multiply_add<UNIT>(query[h], key, dots[r * HEADS + h]);
        }
    }
    float dot[W];
    store(dot, sums_of_rows(dots));
    for (int r = 0; r < ROWS; ++r)
      memcpy(scores + r * heads.lanes + head, dot + r * HEADS, HEADS * sizeof(float));
  }
}

// acc += weights * values of COUNT tokens.
template <int SHARE, int COUNT, typename T>
void add(const DecodeAttention& a, const QueryHeads& heads, const T* const* values,
         const float* weights) {
  for (int64_t head = 0; head < heads.count; head += HEADS) {
    const KvHeads<SHARE> kv(a, heads, head, a.v_cache.head_stride);
    float* acc = heads.acc + head * heads.stride;
    f32v weight[COUNT][HEADS];
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) weight[r][h] = broadcast(weights[r * heads.lanes + head + h]);
    for_each_vector(heads.n, [&](int64_t i, auto lanes) {
      f32v out[HEADS];
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) out[h] = load(acc + h * heads.stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kv.COUNT; ++j) {
          __builtin_prefetch(values[r + AHEAD] + kv.offset[j] + i);
          const f32v value = load(values[r] + kv.offset[j] + i, lanes);
#pragma GCC unroll 4
          for (int h = j * SHARE; h < (j + 1) * SHARE; ++h) out[h] += value * weight[r][h];
        }
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h) store(acc + h * heads.stride + i, out[h]);
    });
  }
}

// Scores of a tile become weights, each lane those of a head, and what the tiles before it left
// behind becomes relative to the new row_max.
inline void softmax(const QueryHeads& heads, int64_t tokens, float scale) {
  const f32v none = broadcast(-INFINITY), factor = broadcast(scale);
  for (int64_t lane = 0; lane < heads.lanes; lane += W) {
    float* scores = heads.scores + lane;
    const f32v before = load(heads.row_max + lane);
    f32v new_max = before;
    for (int64_t t = 0; t < tokens; ++t) {
      const f32v x = load(scores + t * heads.lanes) * factor;
      new_max = x > new_max ? x : new_max;
    }
    // Minus infinities have no maximum to subtract; their weights must be 0, not NaN.
    const f32v shift = new_max == none ? f32v{} : new_max, decay = exp(before - shift);
    f32v sum = load(heads.row_sum + lane) * decay;
    for (int64_t t = 0; t < tokens; ++t) {
      // Rounded once: of a large score, scaled and then shifted, the first rounding would be seen.
      const f32v x = multiply_add<1>(load(scores + t * heads.lanes), factor, -shift);
      const f32v weight = x == none ? f32v{} : exp(x);
      store(scores + t * heads.lanes, weight);
      sum += weight;
    }
    store(heads.row_max + lane, new_max);
    store(heads.row_sum + lane, sum);
    store(heads.decay + lane, decay);
  }
  for (int64_t head = 0; head < heads.count; ++head)
    for (int64_t i = 0; i < heads.stride; i += W) {
      float* output = heads.acc + head * heads.stride + i;
      store(output, load(output) * heads.decay[head]);
    }
}

// KV heads [begin, end) of one sequence.
template <int SHARE, typename T>
void some_heads(const DecodeAttention& a, int64_t sequence, int64_t begin, int64_t end,
                float* scratch) {
  const int64_t n = a.head_dim, group = a.heads / a.kv_heads, length = length_of(a, sequence);
  const int32_t* pages = pages_of(a, sequence);
  const QueryHeads heads(scratch, (end - begin) * group, n);
  memset(scratch, 0, QueryHeads::floats(heads.count, n) * sizeof(float));
  const T* q = (const T*)a.q.data + sequence * a.q.token_stride + begin * group * a.q.head_stride;
  pack_rows(q, a.q.head_stride, heads.count, heads.count, n, heads.queries, heads.stride);
  for (int64_t head = 0; head < heads.lanes; ++head) heads.row_max[head] = -INFINITY;

  const T* k_cache = (const T*)a.k_cache.data + begin * a.k_cache.head_stride;
  const T* v_cache = (const T*)a.v_cache.data + begin * a.v_cache.head_stride;
  for (int64_t first = 0; first < length; first += TILE) {
    const int64_t tokens = length - first < TILE ? length - first : TILE, lanes = heads.lanes;
    const Rows<T> keys(k_cache, a.k_cache, a.page_size, pages, first, length);
    const Rows<T> values(v_cache, a.v_cache, a.page_size, pages, first, length);
    for (int64_t t = 0; t < tokens; t += ROWS)
      score<SHARE>(a, heads, keys.at + t, heads.scores + t * lanes);
    softmax(heads, tokens, a.scale);
    int64_t t = 0;
    for (; t + ROWS <= tokens; t += ROWS)
      add<SHARE, ROWS>(a, heads, values.at + t, heads.scores + t * lanes);
    for (; t < tokens; ++t) add<SHARE, 1>(a, heads, values.at + t, heads.scores + t * lanes);
  }

  for (int64_t head = 0; head < heads.count; ++head) {
    T* out = (T*)a.out + (sequence * a.heads + begin * group + head) * n;
    const float inverse = length > 0 ? 1.0f / heads.row_sum[head] : 0.0f;
    for_each_vector(n, [&](int64_t i, auto lanes) {
      store(out + i, load(heads.acc + head * heads.stride + i, lanes) * inverse, lanes);
    });
  }
}

template <int SHARE, typename T>
void decode(const DecodeAttention& a) {
  int64_t tokens = 0, longest = 0;
  for (int64_t i = 0; i < a.sequences; ++i) {
    const int64_t length = length_of(a, i);
    tokens += length;
    if (length > longest) longest = length;
  }
  // All KV heads of a sequence together read memory best; fewer, where a thread would wait for
  // another that has the longest sequence.
  int64_t together = a.kv_heads;
  while (together > 1 && longest * together * a.threads > tokens * a.kv_heads)
    together = (together + 1) / 2;
  const int64_t parts = (a.kv_heads + together - 1) / together, items = a.sequences * parts;
  const int64_t floats = QueryHeads::floats(together * (a.heads / a.kv_heads), a.head_dim);
  const int threads = useful_threads(items, tokens * a.heads * a.head_dim, a.threads);
  share(items, threads, floats, [&](int64_t item, float* scratch) {
    const int64_t begin = item % parts * together, end = begin + together;
    some_heads<SHARE, T>(a, item / parts, begin, end < a.kv_heads ? end : a.kv_heads, scratch);
  });
}

}  // namespace

void decode_attention(const DecodeAttention& a) {
  for (int64_t i = 0; i < a.sequences; ++i) {
    const int64_t length = length_of(a, i), used = (length + a.page_size - 1) / a.page_size;
    require(0 <= length && used <= a.block_table_columns,
            "lengths: a value is negative or beyond the pages of its row of block_table");
    for (int64_t j = 0; j < used; ++j) {
      const int32_t page = pages_of(a, i)[j];
      require(0 <= page && page < a.pages, "block_table: a page number lies outside the caches");
    }
  }
  const int64_t group = a.heads / a.kv_heads;
  by_dtype(a.dtype, [&](auto t) {
    if (group % 4 == 0)
      decode<4, decltype(t)>(a);
    else if (group % 2 == 0)
      decode<2, decltype(t)>(a);
    else
      decode<1, decltype(t)>(a);
  });
}

}  // namespace LLAMA2RT_ISA

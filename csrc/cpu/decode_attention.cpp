// Attention of the last queries of sequences over a paged KV cache, with grouped queries.
//
// With a few queries what counts is the speed at which the cache is read, once, from memory. So a
// thread takes all KV heads of a sequence together, a few tokens at a time: the order in which the
// cache lies. The processor does not guess well enough what comes next in it, so each step asks,
// between its products, for the same heads of tokens further on. A tile of tokens has its scores,
// their softmax (online, arXiv:1805.02867) and then its values; a key or value serves several rows
// at once, query heads of one query or of several. Neighbours whose pages are the same, answers to one
// prompt, read them together as if they were several queries of one sequence. Everything but the
// products of bf16 with bf16 is fp32.
#include "decode_attention.h"
#include "decode_pieces.h"

namespace LLAMA2RT_ISA {
namespace {

constexpr int TOKENS = W / QUERIES;  // cached tokens of a step: its scores fill a vector
// Chosen by trials on Zen 5: tokens of one softmax, and from the tokens in use to those that are
// asked for.
constexpr int64_t TILE = 32, AHEAD = 8;
static_assert(TILE % TOKENS == 0 && SPLIT % TILE == 0);

// What a thread keeps of the query rows it works on, `count` of a sequence or of several that are read
// together, `per_head` of a KV head. They are padded to whole vectors, their number to whole steps and,
// as they are lanes of the softmax, to vectors.
struct QueryRows {
  QueryRows(float* scratch, int64_t count, int64_t per_head, int64_t n)
      : count(count),
        per_head(per_head),
        n(n),
        stride(row_floats(n)),
        lanes(round_up(count, W)),
        queries(scratch),
        acc(queries + lanes * stride),
        scores(acc + lanes * stride),
        row_max(scores + TILE * lanes),
        row_sum(row_max + lanes),
        decay(row_sum + lanes),
        seen((int32_t*)(decay + lanes)) {}
  static int64_t row_floats(int64_t n) { return round_up(n, W); }
  static int64_t floats(int64_t count, int64_t n) {
    return (2 * row_floats(n) + TILE + 4) * round_up(count, W);
  }

  int64_t count, per_head, n, stride, lanes;
  float *queries, *acc;  // [lanes, stride], queries in units
  float* scores;         // [TILE, lanes], unscaled; the softmax makes weights of them
  // [lanes]; decay is what a tile multiplies the tiles before it by.
  float *row_max, *row_sum, *decay;
  int32_t* seen;  // [lanes], of the sequence's tokens
};

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

// The KV heads of a step, for all of its tokens; SHARE query rows on end have one in common.
template <int SHARE>
struct KvHeads {
  static constexpr int COUNT = QUERIES / SHARE;
  KvHeads(const QueryRows& rows, int64_t row, int64_t head_stride) {
    for (int j = 0; j < COUNT; ++j) {
      // Padding has no KV head; that of the last row will do.
      const int64_t query = row + j * SHARE < rows.count ? row + j * SHARE : rows.count - 1;
      offset[j] = query / rows.per_head * head_stride;
    }
  }
  int64_t offset[COUNT];
};

// Scores of TOKENS tokens.
template <int SHARE, typename T>
void score(const DecodeAttention& a, const QueryRows& rows, const T* const* keys, float* scores) {
  constexpr int64_t UNIT = unit<T>();
  for (int64_t row = 0; row < rows.count; row += QUERIES) {
    const KvHeads<SHARE> kv(rows, row, a.k_cache.head_stride);
    const float* queries = rows.queries + row * rows.stride;
    f32v dots[W] = {};
    for (int64_t i = 0; i < rows.n; i += UNIT * W) {
      f32v query[QUERIES];
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) query[q] = load(queries + q * rows.stride + i / UNIT);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < kv.COUNT; ++j) {
          __builtin_prefetch(keys[t + AHEAD] + kv.offset[j] + i);
          const f32v key = load_units(keys[t] + kv.offset[j] + i, rows.n - i);
#pragma GCC unroll 4
          for (int q = j * SHARE; q < (j + 1) * SHARE; ++q)
            dots[t * QUERIES + q] = multiply_add<UNIT>(query[q], key, dots[t * QUERIES + q]);
        }
    }
    float dot[W];
    store(dot, sums_of_rows(dots));
    for (int t = 0; t < TOKENS; ++t)
      memcpy(scores + t * rows.lanes + row, dot + t * QUERIES, QUERIES * sizeof(float));
  }
}

// acc += weights * values of COUNT tokens.
template <int SHARE, int COUNT, typename T>
void add(const DecodeAttention& a, const QueryRows& rows, const T* const* values,
         const float* weights) {
  for (int64_t row = 0; row < rows.count; row += QUERIES) {
    const KvHeads<SHARE> kv(rows, row, a.v_cache.head_stride);
    float* acc = rows.acc + row * rows.stride;
    f32v weight[COUNT][QUERIES];
#pragma GCC unroll 4
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) weight[t][q] = broadcast(weights[t * rows.lanes + row + q]);
    for_each_vector(rows.n, [&](int64_t i, auto lanes) {
      f32v out[QUERIES];
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) out[q] = load(acc + q * rows.stride + i);
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < kv.COUNT; ++j) {
          __builtin_prefetch(values[t + AHEAD] + kv.offset[j] + i);
          const f32v value = load(values[t] + kv.offset[j] + i, lanes);
#pragma GCC unroll 4
          for (int q = j * SHARE; q < (j + 1) * SHARE; ++q) out[q] += value * weight[t][q];
        }
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) store(acc + q * rows.stride + i, out[q]);
    });
  }
}

// Scores of the tile from token `first` on become weights, each lane those of a row, and what the
// tiles before it left behind becomes relative to the new row_max. MASKED: some row does not see
// some of its tokens.
template <bool MASKED>
inline void softmax(const QueryRows& rows, int64_t first, int64_t tokens, float scale) {
  const f32v none = broadcast(-INFINITY), factor = broadcast(scale);
  for (int64_t lane = 0; lane < rows.lanes; lane += W) {
    float* scores = rows.scores + lane;
    i32v seen;
    memcpy(&seen, rows.seen + lane, sizeof seen);
    seen -= (int32_t)first;
    auto shown = [&](f32v x, int64_t t) { return !MASKED ? x : seen > (int32_t)t ? x : none; };
    const f32v before = load(rows.row_max + lane);
    f32v new_max = before;
    for (int64_t t = 0; t < tokens; ++t) {
      const f32v x = shown(load(scores + t * rows.lanes) * factor, t);
      new_max = x > new_max ? x : new_max;
    }
    // Minus infinities have no maximum to subtract; their weights must be 0, not NaN.
    const f32v shift = new_max == none ? f32v{} : new_max, decay = exp(before - shift);
    f32v sum = load(rows.row_sum + lane) * decay;
    for (int64_t t = 0; t < tokens; ++t) {
      // Rounded once: of a large score, scaled and then shifted, the first rounding would be seen.
      const f32v x = shown(multiply_add<1>(load(scores + t * rows.lanes), factor, -shift), t);
      const f32v weight = x == none ? f32v{} : exp(x);
      store(scores + t * rows.lanes, weight);
      sum += weight;
    }
    store(rows.row_max + lane, new_max);
    store(rows.row_sum + lane, sum);
    store(rows.decay + lane, decay);
  }
  for (int64_t row = 0; row < rows.count; ++row)
    for (int64_t i = 0; i < rows.stride; i += W) {
      float* output = rows.acc + row * rows.stride + i;
      store(output, load(output) * rows.decay[row]);
    }
}

// SHARE divides the sequence's rows of a KV head.
template <int SHARE, typename T>
void attend(const DecodeAttention& a, const Piece& piece, float* scratch) {
  const Sequence sequence(a, piece.sequence);
  const int64_t n = a.head_dim, group = a.heads / a.kv_heads, length = sequence.length;
  const int64_t queries = piece.queries(sequence), per_head = rows_of(queries, group);
  const int64_t begin = piece.begin, end = piece.end;
  const QueryRows rows(scratch, (end - begin) * per_head, per_head, n);
  memset(scratch, 0, QueryRows::floats(rows.count, n) * sizeof(float));
  // Calls body(row, token, head) for `group` rows of a KV head and a query, from that head on.
  auto for_each_query = [&](auto body) {
    for (int64_t kv_head = begin; kv_head < end; ++kv_head)
      for (int64_t i = 0; i < queries; ++i)
        body((kv_head - begin) * per_head + i * group, i, kv_head * group);
  };
  for_each_query([&](int64_t row, int64_t i, int64_t head) {
    const T* q = (const T*)a.q.data + (sequence.first + i) * a.q.token_stride;
    pack_rows(q + head * a.q.head_stride, a.q.head_stride, group, group, n,
              rows.queries + row * rows.stride, rows.stride);
    const int64_t seen = piece.members > 1 ? piece.last : sequence.seen(i);
    for (int64_t j = 0; j < group; ++j) rows.seen[row + j] = (int32_t)seen;
  });
  for (int64_t row = 0; row < rows.lanes; ++row) rows.row_max[row] = -INFINITY;

  const T* k_cache = (const T*)a.k_cache.data + begin * a.k_cache.head_stride;
  const T* v_cache = (const T*)a.v_cache.data + begin * a.v_cache.head_stride;
  for (int64_t first = piece.first; first < piece.last; first += TILE) {
    const int64_t left = piece.last - first, tokens = left < TILE ? left : TILE, lanes = rows.lanes;
    const Rows<T> keys(k_cache, a.k_cache, a.page_size, sequence.pages, first, length);
    const Rows<T> values(v_cache, a.v_cache, a.page_size, sequence.pages, first, length);
    for (int64_t t = 0; t < tokens; t += TOKENS)
      score<SHARE>(a, rows, keys.at + t, rows.scores + t * lanes);
    if (piece.members == 1 && first + tokens > sequence.seen(0))
      softmax<true>(rows, first, tokens, a.scale);
    else
      softmax<false>(rows, first, tokens, a.scale);
    int64_t t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS)
      add<SHARE, TOKENS>(a, rows, values.at + t, rows.scores + t * lanes);
    for (; t < tokens; ++t) add<SHARE, 1>(a, rows, values.at + t, rows.scores + t * lanes);
  }

  for_each_query([&](int64_t row, int64_t i, int64_t head) {
    for (int64_t j = 0; j < group; ++j) {
      const float* acc = rows.acc + (row + j) * rows.stride;
      if (piece.divided()) {
        float* to = piece.sums(a, sequence, i, head + j);
        memcpy(to, acc, n * sizeof(float));
        to[n] = rows.row_max[row + j], to[n + 1] = rows.row_sum[row + j];
        continue;
      }
      T* out = (T*)a.out + ((sequence.first + i) * a.heads + head + j) * n;
      const float inverse = sequence.seen(i) > 0 ? 1.0f / rows.row_sum[row + j] : 0.0f;
      for_each_vector(n, [&](int64_t c, auto lanes) {
        store(out + c, load(acc + c, lanes) * inverse, lanes);
      });
    }
  });
}

// The results of a KV head of a sequence from the sums of all its splits, in order.
template <typename T>
void combine(const DecodeAttention& a, int64_t i, int64_t kv_head, float* partials) {
  const Sequence sequence(a, i);
  const int64_t n = a.head_dim, count = sequence.queries * a.heads, splits = splits_of(sequence);
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t row = 0; row < count; ++row) {
    if (row % a.heads / group != kv_head) continue;
    auto at = [&](int64_t split) { return partials + (split * count + row) * (n + 2); };
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int64_t s = 0; s < splits; ++s) row_max = maximum(row_max, at(s)[n]);
    for (int64_t s = 0; s < splits; ++s) {
      float& weight = at(s)[n];
      weight = weight == -INFINITY ? 0.0f : exp(broadcast(weight - row_max))[0];
      row_sum += weight * at(s)[n + 1];
    }
    const float inverse = sequence.seen(row / a.heads) > 0 ? 1.0f / row_sum : 0.0f;
    T* out = (T*)a.out + (sequence.first * a.heads + row) * n;
    for_each_vector(n, [&](int64_t c, auto lanes) {
      f32v acc = {};
      for (int64_t s = 0; s < splits; ++s) acc += load(at(s) + c, lanes) * at(s)[n];
      store(out + c, acc * inverse, lanes);
    });
  }
}

template <typename T>
void decode_few(const DecodeAttention& a) {
  const Pieces work(a);
  const int threads = useful_threads(work.items, work.pairs * a.heads * a.head_dim, a.threads);
  const int64_t floats = QueryRows::floats(work.most_rows, a.head_dim);
  share(work.items, threads, floats, [&](int64_t item, float* scratch) {
    const Piece& piece = work.pieces.data[item];
    const int64_t shared = rows_of(piece.queries(Sequence(a, piece.sequence)), work.group);
    if (shared % 4 == 0)
      attend<4, T>(a, piece, scratch);
    else if (shared % 2 == 0)
      attend<2, T>(a, piece, scratch);
    else
      attend<1, T>(a, piece, scratch);
  });
  if (work.most_splits <= 1) return;
  share(a.sequences * a.kv_heads, threads, 0, [&](int64_t item, float*) {
    const int64_t i = item / a.kv_heads;
    if (work.is_divided(i)) combine<T>(a, i, item % a.kv_heads, work.partials.data[i]);
  });
}

}  // namespace

void decode_attention(const DecodeAttention& a) {
  for (int64_t i = 0; i < a.sequences; ++i) {
    const Sequence sequence(a, i);
    if (sequence.queries == 0) continue;
    const int64_t used = (sequence.length + a.page_size - 1) / a.page_size;
    require(0 <= sequence.length && used <= a.block_table_columns,
            "lengths: a value is negative or beyond the pages of its row of block_table");
    for (int64_t j = 0; j < used; ++j)
      require(0 <= sequence.pages[j] && sequence.pages[j] < a.pages,
              "block_table: a page number lies outside the caches");
  }
  if (a.heads == 0) return;
  by_dtype(a.dtype, [&](auto t) {
    if (a.q_offsets.data) decode_many<decltype(t)>(a);
    decode_few<decltype(t)>(a);
  });
}

}  // namespace LLAMA2RT_ISA

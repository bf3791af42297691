// Attention of one new token per sequence over a paged KV cache, with grouped queries.
//
// The cache is read once, tile by tile and for all query heads of a group together; each head keeps
// a running maximum, sum and output (online softmax, arXiv:1805.02867). Everything is fp32.
#include "parallel.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

constexpr int64_t TILE = 16;  // cached tokens per step of the softmax

template <typename T>
float dot(const float* q, const T* k, int64_t n) {
  f32v total[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    for (int j = 0; j < 2; ++j) total[j] += load(q + i + j * W) * load(k + i + j * W);
  for_each_vector(n - i, [&](int64_t j, auto lanes) {
    total[0] += load(q + i + j, lanes) * load(k + i + j, lanes);
  });
  return sum(total[0] + total[1]);
}

// One KV head of one sequence. `scratch` holds the group's queries and outputs, fp32.
template <typename T>
void attend(const DecodeAttention& a, int64_t sequence, int64_t kv_head, float* scratch) {
  const int64_t n = a.head_dim, group = a.heads / a.kv_heads, length = a.lengths[sequence];
  const int32_t* pages = a.block_table + sequence * a.block_table_stride;
  const T* k_head = (const T*)a.k_cache + kv_head * a.k_head_stride;
  const T* v_head = (const T*)a.v_cache + kv_head * a.v_head_stride;
  float* queries = scratch;
  float* outputs = scratch + group * n;
  float* maxima = outputs + group * n;
  float* sums = maxima + group;

  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    const T* q = (const T*)a.q + sequence * a.q_sequence_stride + head * a.q_head_stride;
    for_each_vector(n, [&](int64_t i, auto lanes) {
      store(queries + g * n + i, load(q + i, lanes) * a.scale, lanes);
      store(outputs + g * n + i, f32v{}, lanes);
    });
    maxima[g] = -INFINITY;
    sums[g] = 0.0f;
  }

  for (int64_t begin = 0; begin < length; begin += TILE) {
    const int64_t count = length - begin < TILE ? length - begin : TILE;
    const T *k[TILE], *v[TILE];
    for (int64_t t = 0; t < count; ++t) {
      const int64_t page = pages[(begin + t) / a.page_size], slot = (begin + t) % a.page_size;
      k[t] = k_head + page * a.k_page_stride + slot * a.k_token_stride;
      v[t] = v_head + page * a.v_page_stride + slot * a.v_token_stride;
    }
    for (int64_t g = 0; g < group; ++g) {
      float scores[TILE];
      float peak = maxima[g];
      for (int64_t t = 0; t < count; ++t) {
        scores[t] = dot(queries + g * n, k[t], n);
        peak = maximum(peak, scores[t]);
      }
      for (int64_t t = count; t < TILE; ++t) scores[t] = -INFINITY;
      // A row of minus infinities has no maximum to subtract; its weights must be 0, not NaN.
      const float shift = peak == -INFINITY ? 0.0f : peak;
      const float decay = expf(maxima[g] - shift);
      f32v total = {};
      for (int64_t t = 0; t < TILE; t += W) {
        f32v s = load(scores + t);
        f32v p = exp(s - shift);
        p = s == broadcast(-INFINITY) ? f32v{} : p;
        store(scores + t, p);
        total += p;
      }
      sums[g] = sums[g] * decay + sum(total);
      maxima[g] = peak;
      for_each_vector(n, [&](int64_t i, auto lanes) {
        f32v out = load(outputs + g * n + i, lanes) * decay;
        for (int64_t t = 0; t < count; ++t) out += load(v[t] + i, lanes) * scores[t];
        store(outputs + g * n + i, out, lanes);
      });
    }
  }

  for (int64_t g = 0; g < group; ++g) {
    T* out = (T*)a.out + (sequence * a.heads + kv_head * group + g) * n;
    const float inverse = length > 0 ? 1.0f / sums[g] : 0.0f;
    for_each_vector(n, [&](int64_t i, auto lanes) {
      store(out + i, load(outputs + g * n + i, lanes) * inverse, lanes);
    });
  }
}

template <typename T>
void decode(const DecodeAttention& a) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t tokens = 0;
  for (int64_t i = 0; i < a.sequences; ++i) tokens += a.lengths[i];
  const int64_t items = a.sequences * a.kv_heads;
  parallel(items, tokens * a.heads * a.head_dim, a.threads, [&](int64_t begin, int64_t end) {
    Workspace scratch(2 * group * (a.head_dim + 1));
    for (int64_t item = begin; item < end; ++item)
      attend<T>(a, item / a.kv_heads, item % a.kv_heads, scratch.data);
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

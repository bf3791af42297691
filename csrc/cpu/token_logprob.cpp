// The softmax of token_logprob on one tile of logits: some columns of a [T, V] matrix that never
// exists whole. Forward folds a tile into the running statistics of its rows (online softmax,
// arXiv:1805.02867); backward turns its logits into their gradients, in place or not, rounded once.
// The matrix products around it are torch's. Everything but the tile is fp32.
#include "parallel.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

inline f32v larger(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Whether any lane of a is above b.
inline bool any_above(f32v a, f32v b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a > b)) != 0;
#else
  const i32v above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

// x with another number in the lanes beyond a part.
inline f32v only(f32v x, Whole, float) { return x; }
inline f32v only(f32v x, Part part, float beyond) {
  for (int64_t lane = part.count; lane < W; ++lane) x[lane] = beyond;
  return x;
}

// x, rounded to fp32 here: the compiler may not fuse the product that x is with a later sum.
inline f32v rounded(f32v x) {
#if defined(__SSE2__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <int64_t COUNT, typename T>
inline void prefetch(const T* p) {
  for (int64_t i = 0; i < COUNT; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

template <typename T>
float value(const T* p) {
  return load(p, Part{1})[0];
}

// One row: its statistics over the tiles before this one, and the lanes of this one's. All are
// relative to row_max; x = logit - row_max.
template <bool ENTROPY>
struct Row {
  // VECTORS of logits; lanes beyond a part do not count, and are not above row_max.
  template <int VECTORS, typename Lanes>
  void fold(const f32v* logits, Lanes lanes) {
    f32v top = logits[0];
    for (int j = 1; j < VECTORS; ++j) top = larger(logits[j], top);
    if (any_above(top, broadcast(row_max))) raise(top);
    const float scale2 = scale * LOG2E;
    for (int j = 0; j < VECTORS; ++j) {
      // The maximum itself gives exactly 1, so that no row_sum is below 1 and no logprob above 0.
      const f32v x = only(logits[j] - row_max, lanes, 0.0f);
      const f32v e = only(exp2(x * scale2), lanes, 0.0f);
      new_sum += e;
      if (ENTROPY) new_weighted += e * x;
    }
  }

  // A new maximum: against it each x so far is lower by the difference. That is rare after a row's
  // first columns, so logits are read once, not first for their maximum.
  __attribute__((noinline)) void raise(f32v top) {
    const float before = row_max;
    for (int lane = 0; lane < W; ++lane) row_max = maximum(top[lane], row_max);
    const float lower = before - row_max, kept = expf(lower * scale);
    row_sum *= kept;
    new_sum *= kept;
    if (ENTROPY) {
      // Where nothing is kept the difference may be infinite.
      weighted_sum = kept > 0.0f ? weighted_sum * kept + row_sum * (lower * scale) : 0.0f;
      new_weighted = kept > 0.0f ? new_weighted * kept + new_sum * lower : f32v{};
    }
  }

  const float scale;
  float row_max, row_sum, weighted_sum;   // weighted by x * scale
  f32v new_sum, new_weighted;  // weighted by x
};

template <typename T, bool ENTROPY>
void fold(const TokenLogprob& a, int64_t i) {
  const T* logits = (const T*)a.logits.data + i * a.logits.stride;
  const float weighted_sum = ENTROPY ? a.weighted_sum[i] : 0.0f;
  Row<ENTROPY> row = {a.scale, a.row_max[i], a.row_sum[i], weighted_sum, {}, {}};
  constexpr int VECTORS = 4;
  int64_t c = 0;
  for (; c + VECTORS * W <= a.columns; c += VECTORS * W) {
    f32v x[VECTORS];
    for (int j = 0; j < VECTORS; j += 2) load_pair(logits + c + j * W, x + j);
    prefetch<VECTORS * W>(logits + a.logits.stride + c);
    row.template fold<VECTORS>(x, Whole{});
  }
  for_each_vector(a.columns - c, [&](int64_t rest, auto lanes) {
    const f32v x = only(load(logits + c + rest, lanes), lanes, row.row_max);
    row.template fold<1>(&x, lanes);
  });
  a.row_max[i] = row.row_max;
  a.row_sum[i] = row.row_sum + sum(row.new_sum);
  if (ENTROPY) a.weighted_sum[i] = row.weighted_sum + sum(row.new_weighted) * a.scale;
  const int64_t column = a.targets[i] - a.first;
  if (0 <= column && column < a.columns) a.target_logit[i] = value(logits + column);
}

template <typename T>
void forward(const TokenLogprob& a) {
  parallel(a.rows, a.rows * a.columns, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      a.weighted_sum ? fold<T, true>(a, row) : fold<T, false>(a, row);
  });
}

// With g and h the upstream gradients of logprob and entropy, both over the temperature:
//   dlogits = (onehot - p) * g - p * (log p + entropy) * h
// Each row prefetches the next: a tile's rows lie too far apart for the processor to guess.
template <typename T>
void differentiate(const TokenLogprobBackward& a, int64_t row) {
  const T* logits = (const T*)a.logits.data + row * a.logits.stride;
  T* dlogits = (T*)a.dlogits + row * a.dlogits_stride;
  if (a.targets[row] < 0) {
    memset(dlogits, 0, a.columns * sizeof(T));
    return;
  }
  const float lse = a.lse[row], g = a.dlogprob[row] * a.scale;
  const int64_t column = a.targets[row] - a.first;
  const bool here = 0 <= column && column < a.columns;
  const float target_logit = here ? value(logits + column) : 0.0f;
  auto finish = [&](auto gradient) {
    // Rounded as the maximum inside lse was: where one logit is all, its log p is then exactly 0.
    auto log_p = [&](f32v logit) { return rounded(logit * a.scale) - lse; };
    for_each_vector(a.columns, [&](int64_t i, auto lanes) {
      __builtin_prefetch(logits + a.logits.stride + i);
      __builtin_prefetch(dlogits + a.dlogits_stride + i, 1);
      store(dlogits + i, gradient(log_p(load(logits + i, lanes))), lanes);
    });
    if (here) store(dlogits + column, gradient(log_p(broadcast(target_logit))) + g, Part{1});
  };
  if (a.dentropy) {
    const float entropy = a.entropy[row], h = a.dentropy[row] * a.scale;
    finish([&](f32v log_p) { return exp2(log_p * LOG2E) * -(g + h * (log_p + entropy)); });
  } else {
    finish([&](f32v log_p) { return exp2(log_p * LOG2E) * -g; });
  }
}

template <typename T>
void backward(const TokenLogprobBackward& a) {
  parallel(a.rows, a.rows * a.columns, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) differentiate<T>(a, row);
  });
}

}  // namespace

void token_logprob(const TokenLogprob& a) {
  by_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a); });
}
void token_logprob_backward(const TokenLogprobBackward& a) {
  by_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

void add_to(const AddTo& a) {
  parallel(a.items, a.items, a.threads, [&](int64_t begin, int64_t end) {
    by_dtype(a.dtype, [&](auto t) {
      const decltype(t)* x = (const decltype(t)*)a.x + begin;
      for_each_vector(end - begin, [&](int64_t i, auto lanes) {
        float* sum = a.sum + begin + i;
        store(sum, load(sum, lanes) + load(x + i, lanes), lanes);
      });
    });
  });
}

}  // namespace LLAMA2RT_ISA

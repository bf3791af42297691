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

// x with zeros in the lanes beyond a part.
inline f32v only(f32v x, Whole) { return x; }
inline f32v only(f32v x, Part part) {
  for (int64_t lane = part.count; lane < W; ++lane) x[lane] = 0.0f;
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

template <typename T>
float value(const T* p) {
  return load(p, Part{1})[0];
}

// The largest of n values and of `start`.
template <typename T>
float largest(const T* x, int64_t n, float start) {
  // Four maxima: one would wait for the latency of each comparison.
  f32v peaks[4];
  for (f32v& peak : peaks) peak = broadcast(start);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) peaks[j] = larger(load(x + i + j * W), peaks[j]);
  for (; i + W <= n; i += W) peaks[0] = larger(load(x + i), peaks[0]);
  for (; i < n; ++i) peaks[0] = larger(broadcast(value(x + i)), peaks[0]);
  peaks[0] = larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
  for (int lane = 0; lane < W; ++lane) start = maximum(peaks[0][lane], start);
  return start;
}

template <typename T, bool ENTROPY>
void fold(const TokenLogprob& a, int64_t row) {
  const T* logits = (const T*)a.logits + row * a.stride;
  const float before = a.peak[row], peak = largest(logits, a.columns, before);
  const float scale2 = a.scale * LOG2E;
  f32v total = {}, weighted = {};
  for_each_vector(a.columns, [&](int64_t i, auto lanes) {
    // The peak itself gives exactly 1, so that no total is below 1 and no logprob above 0.
    f32v x = load(logits + i, lanes) - peak;
    f32v e = only(exp2(x * scale2), lanes);
    total += e;
    if (ENTROPY) weighted += e * x;
  });
  const float shift = (before - peak) * a.scale;
  const float kept = a.total[row] * expf(shift);
  if (ENTROPY) {
    // Against the new peak each earlier x is lower by the shift; an infinite one keeps nothing.
    const float moved = kept > 0.0f ? a.weighted[row] * expf(shift) + shift * kept : 0.0f;
    a.weighted[row] = moved + sum(weighted) * a.scale;
  }
  a.total[row] = kept + sum(total);
  a.peak[row] = peak;
  const int64_t column = a.targets[row] - a.first;
  if (0 <= column && column < a.columns) a.chosen[row] = value(logits + column);
}

template <typename T>
void forward(const TokenLogprob& a) {
  parallel(a.rows, a.rows * a.columns, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      a.weighted ? fold<T, true>(a, row) : fold<T, false>(a, row);
  });
}

// With g and h the upstream gradients of logprob and entropy, both over the temperature:
//   dlogits = (onehot - p) * g - p * (log p + entropy) * h
template <typename T>
void differentiate(const TokenLogprobBackward& a, int64_t row) {
  const T* logits = (const T*)a.logits + row * a.stride;
  T* dlogits = (T*)a.dlogits + row * a.dlogits_stride;
  if (a.targets[row] < 0) {
    memset(dlogits, 0, a.columns * sizeof(T));
    return;
  }
  const float lse = a.lse[row], g = a.dlogprob[row] * a.scale;
  const int64_t column = a.targets[row] - a.first;
  const bool here = 0 <= column && column < a.columns;
  const float chosen = here ? value(logits + column) : 0.0f;
  auto finish = [&](auto gradient) {
    // Rounded as the peak inside lse was: where one logit is all, its log p is then exactly 0.
    auto log_p = [&](f32v logit) { return rounded(logit * a.scale) - lse; };
    for_each_vector(a.columns, [&](int64_t i, auto lanes) {
      store(dlogits + i, gradient(log_p(load(logits + i, lanes))), lanes);
    });
    if (here) store(dlogits + column, gradient(log_p(broadcast(chosen))) + g, Part{1});
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
        float* total = a.total + begin + i;
        store(total, load(total, lanes) + load(x + i, lanes), lanes);
      });
    });
  });
}

}  // namespace LLAMA2RT_ISA

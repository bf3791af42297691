// The softmax of token_logprob on a row of a tile of logits: some columns of a [T, V] matrix that
// never exists whole. Forward counts a row's logits and merges the counts of tiles (online softmax,
// arXiv:1805.02867); backward turns logits into their gradients, in place or not, rounded once.
// Everything but the tile is fp32. Who makes the tile is for the files that include this.
#pragma once

#include "parallel.h"

namespace LLAMA2RT_ISA {

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
inline float value(const T* p) {
  return load(p, Part{1})[0];
}

// The largest of n values and of `start`.
template <typename T>
inline float largest(const T* x, int64_t n, float start) {
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

// Of some logits of each row, with x = (logit - peak) * scale: the peak, which is no less than that
// of the tiles before; the sum of exp(x); that of exp(x) * x, unless null. Each [rows].
struct Counts {
  Counts(float* memory, int64_t rows, bool entropy)
      : peak(memory), total(memory + rows), weighted(entropy ? memory + 2 * rows : nullptr) {}
  float *const peak, *const total, *const weighted;
};

// Counts a row's logits from `first` of the vocabulary on, and looks for its target's among them.
template <bool ENTROPY, typename T>
inline void count(const TokenLogprob& a, const T* logits, int64_t first, int64_t columns,
                  int64_t row, const Counts& to) {
  const float peak = largest(logits, columns, a.peak[row]), scale2 = a.scale * LOG2E;
  f32v total = {}, weighted = {};
  for_each_vector(columns, [&](int64_t i, auto lanes) {
    // The peak itself gives exactly 1, so that no total is below 1 and no logprob above 0.
    f32v x = load(logits + i, lanes) - peak;
    f32v e = only(exp2(x * scale2), lanes);
    total += e;
    if (ENTROPY) weighted += e * x;
  });
  to.peak[row] = peak;
  to.total[row] = sum(total);
  if (ENTROPY) to.weighted[row] = sum(weighted) * a.scale;
  const int64_t column = a.targets[row] - first;
  if (0 <= column && column < columns) a.chosen[row] = value(logits + column);
}

template <typename T>
inline void count(const TokenLogprob& a, const T* logits, int64_t first, int64_t columns,
                  int64_t row, const Counts& to) {
  a.weighted ? count<true>(a, logits, first, columns, row, to)
             : count<false>(a, logits, first, columns, row, to);
}

// Adds counts to the statistics of the tiles so far.
inline void merge(const TokenLogprob& a, const Counts& counts) {
  for_each_vector(a.rows, [&](int64_t row, auto lanes) {
    const f32v before = load(a.peak + row, lanes), after = load(counts.peak + row, lanes);
    const f32v peak = larger(before, after);
    f32v total = {}, weighted = {};
    auto add = [&](f32v old_peak, const float* old_total, const float* old_weighted) {
      // Against the new peak each x is lower by the shift; an infinite one keeps nothing.
      const f32v shift = (old_peak - peak) * a.scale, factor = exp2(shift * LOG2E);
      const f32v kept = load(old_total + row, lanes) * factor;
      total += kept;
      if (a.weighted)
        weighted += kept > 0.0f ? load(old_weighted + row, lanes) * factor + shift * kept : f32v{};
    };
    add(before, a.total, a.weighted);
    add(after, counts.total, counts.weighted);
    store(a.peak + row, peak, lanes);
    store(a.total + row, total, lanes);
    if (a.weighted) store(a.weighted + row, weighted, lanes);
  });
}

// With g and h the upstream gradients of logprob and entropy, both over the temperature:
//   dlogits = (onehot - p) * g - p * (log p + entropy) * h
template <typename T>
inline void differentiate(const TokenLogprobBackward& a, const T* logits, T* dlogits, int64_t first,
                          int64_t columns, int64_t row) {
  if (a.targets[row] < 0) {
    memset(dlogits, 0, columns * sizeof(T));
    return;
  }
  const float lse = a.lse[row], g = a.dlogprob[row] * a.scale;
  const int64_t column = a.targets[row] - first;
  const bool here = 0 <= column && column < columns;
  const float chosen = here ? value(logits + column) : 0.0f;
  auto finish = [&](auto gradient) {
    // Rounded as the peak inside lse was: where one logit is all, its log p is then exactly 0.
    auto log_p = [&](f32v logit) { return rounded(logit * a.scale) - lse; };
    for_each_vector(columns, [&](int64_t i, auto lanes) {
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

}  // namespace LLAMA2RT_ISA

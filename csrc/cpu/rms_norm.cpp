// RMSNorm (arXiv:1910.07467) with and without the residual addition before it, and its gradient.
//
//   summed = x + residual            in the storage type, as the model that was trained added them
//   rstd = 1 / sqrt(mean(summed^2) + eps)
//   y = weight * cast(summed * rstd)
//
// A row is read twice, the second time from cache. Sums are fp32.
#include "parallel.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

template <typename T>
float sum_of_squares(const T* x, int64_t n) {
  // Four accumulators: one would wait for the latency of each addition.
  f32v acc[4] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  // Dot products of 32 bf16 pairs without widening them; products of bf16 are exact in fp32.
  if (is_bf16(T{}))
    for (; i + 8 * W <= n; i += 8 * W)
      for (int j = 0; j < 4; ++j) {
        __m512bh v;
        memcpy(&v, x + i + 2 * j * W, sizeof v);
        acc[j] = (f32v)_mm512_dpbf16_ps((__m512)acc[j], v, v);
      }
#endif
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      f32v v = load(x + i + j * W);
      acc[j] += v * v;
    }
  for_each_vector(n - i, [&](int64_t j, auto lanes) {
    f32v v = load(x + i + j, lanes);
    acc[0] += v * v;
  });
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <typename T>
float add_and_sum_squares(const T* x, const T* residual, T* summed, int64_t n) {
  f32v acc[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    for (int j = 0; j < 2; ++j) {
      f32v v = round_to(load(x + i + j * W) + load(residual + i + j * W), T{});
      store(summed + i + j * W, v);
      acc[j] += v * v;
    }
  for_each_vector(n - i, [&](int64_t j, auto lanes) {
    f32v v = round_to(load(x + i + j, lanes) + load(residual + i + j, lanes), T{});
    store(summed + i + j, v, lanes);
    acc[0] += v * v;
  });
  return sum(acc[0] + acc[1]);
}

template <typename T>
void forward(const RmsNorm& a) {
  const int64_t n = a.columns, row_bytes = n * (int64_t)sizeof(T);
  const T* weight = (const T*)a.weight;
  const int64_t bytes = (a.residual ? 4 : 2) * a.rows * row_bytes;
  const bool past = streamed(bytes, row_bytes, a.y, a.summed);
  parallel(a.rows, a.rows * n, a.threads, [&](int64_t begin, int64_t end) {
    // A sum that goes past the caches is kept here for the second reading.
    const bool copied = past && a.residual;
    Workspace<T> copy(copied ? n : 0);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = (const T*)a.x.data + row * a.x.stride;
      T *y = (T*)a.y + row * n, *summed = nullptr;
      float squares;
      if (a.residual) {
        const T* residual = (const T*)a.residual.data + row * a.residual.stride;
        summed = (T*)a.summed + row * n;
        T* sum = copied ? copy.data : summed;
        squares = add_and_sum_squares(x, residual, sum, n);
        x = sum;
      } else {
        squares = sum_of_squares(x, n);
      }
      const float rstd = 1.0f / sqrtf(squares / (float)n + a.eps);
      a.rstd[row] = rstd;
      const int64_t next = row_ahead(row, a.rows, row_bytes);
      const T* next_x = (const T*)a.x.data + next * a.x.stride;
      const T* next_residual =
          a.residual ? (const T*)a.residual.data + next * a.residual.stride : nullptr;
      for_each_vector(n, past, [&](int64_t i, auto lanes) {
        __builtin_prefetch(next_x + i);
        if (next_residual) __builtin_prefetch(next_residual + i);
        const f32v v = load(x + i, lanes);
        if (copied) store(summed + i, v, lanes);
        store(y + i, round_to(v * rstd, T{}) * load(weight + i, lanes), lanes);
      });
    }
  });
}

// With g = dy * weight and xhat = x * rstd:
//   dx = rstd * (g - xhat * mean(g * xhat)) + dsummed,  dweight = sum over rows of dy * xhat
template <typename T>
void backward_row(const RmsNormBackward& a, int64_t row, float* dweight) {
  const int64_t n = a.columns, row_bytes = n * (int64_t)sizeof(T);
  const bool past = streamed((a.dsummed ? 4 : 3) * a.rows * row_bytes, row_bytes, a.dx, nullptr);
  const int64_t next = row_ahead(row, a.rows, row_bytes);
  const T* next_dy = (const T*)a.dy.data + next * a.dy.stride;
  const T* next_x = (const T*)a.x.data + next * a.x.stride;
  const T* dy = (const T*)a.dy.data + row * a.dy.stride;
  const T* x = (const T*)a.x.data + row * a.x.stride;
  const T* weight = (const T*)a.weight;
  T* dx = (T*)a.dx + row * n;
  const float rstd = a.rstd[row];

  f32v acc[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * W;
      acc[j] += load(dy + at) * load(weight + at) * load(x + at);
    }
  for_each_vector(n - i, [&](int64_t j, auto lanes) {
    const int64_t at = i + j;
    acc[0] += load(dy + at, lanes) * load(weight + at, lanes) * load(x + at, lanes);
  });
  const float projection = sum(acc[0] + acc[1]) * rstd / (float)n;

  auto finish = [&](auto extra) {
    for_each_vector(n, past, [&](int64_t j, auto lanes) {
      __builtin_prefetch(next_dy + j);
      __builtin_prefetch(next_x + j);
      f32v grad = load(dy + j, lanes), xhat = load(x + j, lanes) * rstd;
      f32v result = (grad * load(weight + j, lanes) - xhat * projection) * rstd;
      store(dx + j, result + extra(j, lanes), lanes);
      store(dweight + j, load(dweight + j, lanes) + grad * xhat, kept(lanes));
    });
  };
  if (a.dsummed) {
    const T* dsummed = (const T*)a.dsummed.data + row * a.dsummed.stride;
    finish([&](int64_t j, auto lanes) { return load(dsummed + j, lanes); });
  } else {
    finish([&](int64_t, auto) { return f32v{}; });
  }
}

template <typename T>
void backward(const RmsNormBackward& a) {
  // The weight gradient is summed over blocks of rows and then over blocks. How many blocks there
  // are depends on the shape alone, so the result does not depend on the number of threads.
  const int64_t n = a.columns;
  int64_t blocks = (a.rows + 31) / 32;
  if (blocks > 64) blocks = 64;
  Workspace partial(blocks * n);
  parallel(blocks, a.rows * n, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dweight = partial.data + block * n;
      memset(dweight, 0, n * sizeof(float));
      for (int64_t row = a.rows * block / blocks; row < a.rows * (block + 1) / blocks; ++row)
        backward_row<T>(a, row, dweight);
    }
  });
  const int64_t strips = (n + W - 1) / W;
  parallel(strips, blocks * n, a.threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * W, last = end * W < n ? end * W : n;
    for_each_vector(last - first, [&](int64_t i, auto lanes) {
      f32v acc = {};
      for (int64_t block = 0; block < blocks; ++block)
        acc += load(partial.data + block * n + first + i, lanes);
      store((T*)a.dweight + first + i, acc, lanes);
    });
  });
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  by_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a); });
}
void rms_norm_backward(const RmsNormBackward& a) {
  by_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace LLAMA2RT_ISA

// SwiGLU (arXiv:2002.05202): y = silu(gate) * up, in fp32 throughout and rounded once; its gradient.
#include "parallel.h"

namespace LLAMA2RT_ISA {
namespace {

template <typename T>
void forward(const SwiGlu& a) {
  const int64_t n = a.columns, row_bytes = n * (int64_t)sizeof(T);
  const bool past = streamed(3 * a.rows * row_bytes, row_bytes, a.y, nullptr);
  parallel(a.rows, a.rows * n, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t next = row_ahead(row, a.rows, row_bytes);
      const T* gate = (const T*)a.gate.data + row * a.gate.stride;
      const T* up = (const T*)a.up.data + row * a.up.stride;
      const T* next_gate = (const T*)a.gate.data + next * a.gate.stride;
      const T* next_up = (const T*)a.up.data + next * a.up.stride;
      T* y = (T*)a.y + row * n;
      for_each_vector(n, past, [&](int64_t i, auto lanes) {
        __builtin_prefetch(next_gate + i);
        __builtin_prefetch(next_up + i);
        f32v g = load(gate + i, lanes);
        store(y + i, g * sigmoid(g) * load(up + i, lanes), lanes);
      });
    }
  });
}

// d silu(g) / dg = s + g * s * (1 - s) with s = sigmoid(g)
template <typename T>
void backward(const SwiGluBackward& a) {
  const int64_t n = a.columns, row_bytes = n * (int64_t)sizeof(T);
  const bool past = streamed(5 * a.rows * row_bytes, row_bytes, a.dgate, a.dup);
  parallel(a.rows, a.rows * n, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t next = row_ahead(row, a.rows, row_bytes);
      const T* dy = (const T*)a.dy.data + row * a.dy.stride;
      const T* gate = (const T*)a.gate.data + row * a.gate.stride;
      const T* up = (const T*)a.up.data + row * a.up.stride;
      const T* next_dy = (const T*)a.dy.data + next * a.dy.stride;
      const T* next_gate = (const T*)a.gate.data + next * a.gate.stride;
      const T* next_up = (const T*)a.up.data + next * a.up.stride;
      T* dgate = (T*)a.dgate + row * n;
      T* dup = (T*)a.dup + row * n;
      for_each_vector(n, past, [&](int64_t i, auto lanes) {
        __builtin_prefetch(next_dy + i);
        __builtin_prefetch(next_gate + i);
        __builtin_prefetch(next_up + i);
        f32v grad = load(dy + i, lanes), g = load(gate + i, lanes);
        f32v s = sigmoid(g);
        f32v silu = g * s;
        store(dup + i, grad * silu, lanes);
        store(dgate + i, grad * load(up + i, lanes) * (s + silu * (1.0f - s)), lanes);
      });
    }
  });
}

}  // namespace

void swiglu(const SwiGlu& a) {
  by_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a); });
}
void swiglu_backward(const SwiGluBackward& a) {
  by_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace LLAMA2RT_ISA

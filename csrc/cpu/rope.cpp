// Rotary position embedding (arXiv:2104.09864), half-split pairs as in Hugging Face weights:
// element i of a head turns together with element i + head_dim / 2. Tables and arithmetic are fp32.
#include "parallel.h"

namespace LLAMA2RT_ISA {
namespace {

template <typename T>
void rotate(const RopeHeads& a, int64_t token, int64_t half, const float* cos, const float* sin,
            float direction, bool past) {
  for (int64_t head = 0; head < a.heads; ++head) {
    const T* x = (const T*)a.x.data + token * a.x.token_stride + head * a.x.head_stride;
    T* y = (T*)a.y + (token * a.heads + head) * 2 * half;
    for_each_vector(half, past, [&](int64_t i, auto lanes) {
      f32v first = load(x + i, lanes), second = load(x + half + i, lanes);
      f32v c = load(cos + i, lanes), s = load(sin + i, lanes) * direction;
      store(y + i, first * c - second * s, lanes);
      store(y + half + i, second * c + first * s, lanes);
    });
  }
}

int64_t position_of(const Rope& a, int64_t token) {
  return a.positions.are_int64 ? ((const int64_t*)a.positions.data)[token]
                               : ((const int32_t*)a.positions.data)[token];
}

template <typename T>
void apply(const Rope& a) {
  const int64_t half = a.head_dim / 2;
  const int64_t elements = a.tokens * (a.q.heads + a.k.heads) * a.head_dim;
  const int64_t size = sizeof(T);
  const bool past = streamed(2 * elements * size, half * size, a.q.y, a.k.y);
  const float direction = a.inverse ? -1.0f : 1.0f;
  parallel(a.tokens, elements, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* cos = a.cos + position_of(a, token) * half;
      const float* sin = a.sin + position_of(a, token) * half;
      rotate<T>(a.q, token, half, cos, sin, direction, past);
      rotate<T>(a.k, token, half, cos, sin, direction, past);
    }
  });
}

}  // namespace

void rope(const Rope& a) {
  for (int64_t token = 0; token < a.tokens; ++token) {
    const int64_t position = position_of(a, token);
    require(0 <= position && position < a.table_rows,
            "positions: a value lies outside the rows of cos and sin");
  }
  by_dtype(a.dtype, [&](auto t) { apply<decltype(t)>(a); });
}

}  // namespace LLAMA2RT_ISA

// Vectors of fp32 and the three storage types, for whichever instruction set this file is compiled.
//
// Each op is compiled once per instruction set, into a namespace of that name, and arithmetic is
// written once with the compiler's vector extension. Intrinsics appear only where the extension
// has no word for an instruction: 16-bit conversions, sums across lanes, scaling by powers of two.
// Templates of the standard library stay out of these files: the linker keeps one copy of an inline
// function, and it could be the one compiled for a machine this is not.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace LLAMA2RT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * W)));
typedef int32_t i32v __attribute__((vector_size(4 * W)));
typedef uint32_t u32v __attribute__((vector_size(4 * W)));
typedef uint16_t u16v __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr bool is_bf16(bf16) { return true; }
template <typename T>
constexpr bool is_bf16(T) {
  return false;
}

inline f32v broadcast(float value) { return value - f32v{}; }

// ---- conversions ----

// The compiler's own 16 to 32 bit conversion takes four instructions where there is one.
inline u32v widen(u16v bits) {
#if defined(__AVX512F__)
  return (u32v)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (u32v)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, u32v);
#endif
}

inline f32v widen(u16v bits, bf16) { return (f32v)(widen(bits) << 16); }

inline u16v narrow(f32v x, bf16) {
#if defined(__AVX512BF16__)
  return (u16v)_mm512_cvtneps_pbh((__m512)x);
#else
  // Round to nearest even on the bits; a NaN must not round to infinity.
  u32v bits = (u32v)x;
  u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u32v quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : quiet, u16v);
#endif
}

#if defined(__AVX512F__)
inline f32v widen(u16v bits, f16) { return (f32v)_mm512_cvtph_ps((__m256i)bits); }
inline u16v narrow(f32v x, f16) {
  return (u16v)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
inline f32v widen(u16v bits, f16) { return (f32v)_mm256_cvtph_ps((__m128i)bits); }
inline u16v narrow(f32v x, f16) {
  return (u16v)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline f32v widen(u16v half, f16) {
  // Multiplying by 2^112 moves the exponent from fp16's bias to fp32's, subnormals included.
  u32v bits = widen(half);
  u32v magnitude = (bits & 0x7fff) << 13;
  u32v scaled = (u32v)((f32v)magnitude * 0x1p112f);
  u32v special = magnitude | 0x7f800000;
  return (f32v)((magnitude >= 0x0f800000 ? special : scaled) | ((bits & 0x8000) << 16));
}
inline u16v narrow(f32v x, f16) {
  u32v bits = (u32v)x;
  u32v sign = (bits >> 16) & 0x8000;
  u32v magnitude = bits & 0x7fffffff;
  // Normal results: rebias, round to nearest even; a carry out of the mantissa is the right result.
  u32v normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 lets the adder shift and round.
  u32v subnormal = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000;
  u32v result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? (u32v{} + 0x7c00) : result;
  result = magnitude > 0x7f800000 ? (u32v{} + 0x7e00) : result;
  return __builtin_convertvector(result | sign, u16v);
}
#endif

// ---- loads and stores, any alignment ----

inline f32v load(const float* p) {
  f32v v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline f32v load(const T* p) {
  u16v v;
  memcpy(&v, p, sizeof v);
  return widen(v, T{});
}

// 2 W elements in some order, for sums: pairs of bf16 come apart in place.
template <typename T>
inline void load_pair(const T* p, f32v* pair) {
  pair[0] = load(p);
  pair[1] = load(p + W);
}
inline void load_pair(const bf16* p, f32v* pair) {
  u32v bits;
  memcpy(&bits, p, sizeof bits);
  pair[0] = (f32v)(bits << 16);
  pair[1] = (f32v)(bits & 0xffff0000);
}

inline void store(float* p, f32v x) { memcpy(p, &x, sizeof x); }
template <typename T>
inline void store(T* p, f32v x) {
  u16v v = narrow(x, T{});
  memcpy(p, &v, sizeof v);
}

// A loop over a row works on whole vectors and then on what is left; its body is written once and
// told by one of these types which it is.
struct Whole {};
struct Streamed {};  // whole, and results go past the caches; their rows fill cache lines
struct Part {
  int64_t count;  // 0 < count < W; lanes beyond it load as zero and are not stored
};

// The same lanes, for a result that is soon read again.
inline Whole kept(Whole) { return {}; }
inline Whole kept(Streamed) { return {}; }
inline Part kept(Part part) { return part; }

template <typename T>
inline f32v load(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline f32v load(const T* p, Streamed) {
  return load(p);
}
#if defined(__AVX512F__)
// A copy of a number of bytes that the compiler does not know is a call.
inline __mmask16 mask_of(Part part) { return (__mmask16)((1u << part.count) - 1); }
inline f32v load(const float* p, Part part) {
  return (f32v)_mm512_maskz_loadu_ps(mask_of(part), p);
}
template <typename T>
inline f32v load(const T* p, Part part) {
  return widen((u16v)_mm256_maskz_loadu_epi16(mask_of(part), p), T{});
}
#else
template <typename T>
inline f32v load(const T* p, Part part) {
  T lanes[W] = {};
  memcpy(lanes, p, part.count * sizeof(T));
  return load(lanes);
}
#endif
template <typename T>
inline void store(T* p, f32v x, Whole) {
  store(p, x);
}
#if defined(__AVX512F__)
inline void stream(float* p, f32v x) { _mm512_stream_ps(p, (__m512)x); }
inline void stream(void* p, u16v x) { _mm256_stream_si256((__m256i*)p, (__m256i)x); }
#elif defined(__AVX2__)
inline void stream(float* p, f32v x) { _mm256_stream_ps(p, (__m256)x); }
inline void stream(void* p, u16v x) { _mm_stream_si128((__m128i*)p, (__m128i)x); }
#elif defined(__x86_64__)
inline void stream(float* p, f32v x) { _mm_stream_ps(p, (__m128)x); }
inline void stream(void* p, u16v x) { _mm_stream_si64((long long*)p, (long long)x); }
#else
inline void stream(float* p, f32v x) { store(p, x); }
inline void stream(void* p, u16v x) { memcpy(p, &x, sizeof x); }
#endif
inline void store(float* p, f32v x, Streamed) { stream(p, x); }
template <typename T>
inline void store(T* p, f32v x, Streamed) {
  stream(p, narrow(x, T{}));
}
#if defined(__AVX512F__)
inline void store(float* p, f32v x, Part part) {
  _mm512_mask_storeu_ps(p, mask_of(part), (__m512)x);
}
template <typename T>
inline void store(T* p, f32v x, Part part) {
  _mm256_mask_storeu_epi16(p, mask_of(part), (__m256i)narrow(x, T{}));
}
#else
template <typename T>
inline void store(T* p, f32v x, Part part) {
  T lanes[W];
  store(lanes, x);
  memcpy(p, lanes, part.count * sizeof(T));
}
#endif

template <typename Body>
inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// The same for results that go past the caches if `streamed`; then n is a multiple of W.
template <typename Body>
inline void for_each_vector(int64_t n, bool streamed, Body body) {
  if (!streamed) return for_each_vector(n, body);
  for (int64_t i = 0; i < n; i += W) body(i, Streamed{});
}

// x rounded to T and back, where a definition casts in the middle.
inline f32v round_to(f32v x, float) { return x; }
template <typename T>
inline f32v round_to(f32v x, T) {
  return widen(narrow(x, T{}), T{});
}

// ---- arithmetic ----

inline float sum(f32v x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[W];
  memcpy(lanes, &x, sizeof x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

inline float maximum(float a, float b) { return a > b ? a : b; }

constexpr float LOG2E = 1.44269504088896341f;  // e^x = exp2(x * LOG2E)

// exp with a relative error under 2e-7 (the polynomial of Cephes' expf). Arguments are clamped to
// where the result is a normal number; NaN stays NaN.
inline f32v exp(f32v x) {
  const f32v low = broadcast(-87.33f), high = broadcast(88.02f);
#if defined(__AVX512F__)
  // Of a NaN and a number these return the second operand.
  x = (f32v)_mm512_max_ps((__m512)low, (__m512)x);
  x = (f32v)_mm512_min_ps((__m512)high, (__m512)x);
#else
  x = x < low ? low : x;
  x = x > high ? high : x;
#endif
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
  const float magic = 12582912.0f;
  f32v shifted = x * LOG2E + magic;
  f32v n = shifted - magic;
  f32v r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32v p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (f32v)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  i32v power = ((i32v)shifted - (i32v)broadcast(magic) + 127) << 23;
  return p * (f32v)power;
#endif
}

// 2^r with a relative error under 1.7e-7 for 0 <= r <= 1, and exactly 1 for 0: a minimax polynomial
// under that condition.
inline f32v power_of_fraction(f32v r) {
  f32v p = broadcast(1.8671300495043397e-3f);
  p = p * r + 9.017030708491802e-3f;
  p = p * r + 5.579991266131401e-2f;
  p = p * r + 2.4016444385051727e-1f;
  p = p * r + 6.931512951850891e-1f;
  return p * r + 1.0f;
}

// 2^x for x up to 127 with a relative error under 2e-7; at most 2^-126 for any x below -126, and 0
// for minus infinity. NaN stays NaN. In a softmax it spares exp's clamps and exact reduction.
inline f32v exp2(f32v x) {
#if defined(__AVX512DQ__)
  // x - floor(x), and 0 for an infinity.
  const f32v fraction = (f32v)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  // Of its second operand this takes the floor.
  return (f32v)_mm512_scalef_ps((__m512)power_of_fraction(fraction), (__m512)x);
#else
  const float magic = 12582912.0f;
  const f32v clamped = x < broadcast(-126.0f) ? broadcast(-126.0f) : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits; of half less than x that is the
  // floor, or for an odd x one less, and the fraction 1.
  const f32v shifted = (clamped - 0.5f) + magic, n = shifted - magic;
  const f32v p = power_of_fraction(clamped - n);
  const f32v result = (f32v)((i32v)p + ((i32v)shifted << 23));
  return x < broadcast(-126.0f) ? f32v{} : x == x ? result : x;
#endif
}

inline f32v reciprocal(f32v x) {
#if defined(__AVX512F__)
  // An estimate of 14 bits and one step of Newton's method: a third of a division's time.
  f32v r = (f32v)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

inline f32v sigmoid(f32v x) { return reciprocal(1.0f + exp(-x)); }

}  // namespace LLAMA2RT_ISA

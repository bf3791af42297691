// Stands in for CUDA's header: the words and built-in functions that the kernels use. What is not
// here does not compile, on purpose: add it when a kernel needs it.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };

// ---- Arithmetic ----
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float x, float y) { return x * y; }  // never fused with an addition
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __cvta_generic_to_shared(const void*) = delete;  // addresses are for PTX alone

// ---- Threads of a block ----
inline void __syncthreads(llama2rt::emulator::Site site = llama2rt::emulator::Site::here()) {
  llama2rt::emulator::block_barrier(site);
}

// ---- Lanes of a warp ----
namespace llama2rt::emulator {

void warp_barrier(unsigned mask, Site site);
unsigned ballot(unsigned mask, bool predicate);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source);

// The value of lane `source`, for anything of at most 8 bytes.
template <typename T>
T shuffled(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace llama2rt::emulator

inline void __syncwarp(unsigned mask = 0xffffffff,
                       llama2rt::emulator::Site site = llama2rt::emulator::Site::here()) {
  llama2rt::emulator::warp_barrier(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return llama2rt::emulator::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Within segments of `width` lanes; a source outside the segment is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = (int)llama2rt::emulator::lane();
  return llama2rt::emulator::shuffled(mask, value, (lane & -width) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = (int)llama2rt::emulator::lane(), source = lane ^ lanes;
  return llama2rt::emulator::shuffled(mask, value, source < (lane & -width) + width ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = (int)llama2rt::emulator::lane(), source = lane + (int)lanes;
  return llama2rt::emulator::shuffled(mask, value, source < (lane & -width) + width ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = (int)llama2rt::emulator::lane(), source = lane - (int)lanes;
  return llama2rt::emulator::shuffled(mask, value, source >= (lane & -width) ? source : lane);
}

// ---- Memory ----
// Again until no other OS thread has come in between.
template <typename T>
T atomicAdd(T* p, T value) {
  T before = *p, after;
  do after = before + value;
  while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return before;
}

// What kernels share: loads and stores of WIDTH neighbouring elements as fp32, in one 16-byte
// access where WIDTH fills it, pairs in a register, sums over lanes and thread blocks, and the choice
// of a kernel by element type and alignment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "ops.h"

namespace llama2rt {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr float LOG2E = 1.4426950408889634f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// WIDTH elements in a row of memory, aligned to their total size.
template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Pack {
  T lanes[WIDTH];

  __device__ static Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }
  __device__ float operator[](int i) const { return to_float(lanes[i]); }
  __device__ void set(int i, float x) { lanes[i] = from_float<T>(x); }
};

// Two numbers rounded to T, the first in the low half.
template <typename T>
__device__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&packed, &pair, sizeof packed);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&packed, &pair, sizeof packed);
  }
  return packed;
}

// Over the lanes whose numbers differ in the bits `first`, 2 `first`, ... `last`, for each of them.
__device__ inline float largest_of_lanes(float x, int first, int last) {
  for (int lanes = first; lanes <= last; lanes *= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lanes));
  return x;
}

__device__ inline float sum_of_lanes(float x, int first, int last) {
  for (int lanes = first; lanes <= last; lanes *= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
  return x;
}

// Sum over all threads of the block, returned to each; blockDim.x is a multiple of 32. `warps`
// holds 32 floats of shared memory that no thread may still be reading.
__device__ inline float block_sum(float x, float* warps) {
  x = sum_of_lanes(x, 1, 16);
  const int lane = threadIdx.x % 32;
  if (lane == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = lane < blockDim.x / 32 ? warps[lane] : 0.0f;
  return sum_of_lanes(x, 1, 16);
}

// Calls function(T{}) for the element type that `dtype` names.
template <typename Function>
void by_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::fp32: return function(float{});
    case DType::bf16: return function(bf16{});
    case DType::fp16: return function(f16{});
  }
}

// Calls function(WIDTH), a compile-time constant: elements of 16 bytes if `wide`, else one element.
template <typename T, typename Function>
void by_width(bool wide, Function function) {
  if (wide)
    function(std::integral_constant<int, 16 / sizeof(T)>{});
  else
    function(std::integral_constant<int, 1>{});
}

// Whether every row of a matrix begins at a multiple of 16 bytes.
template <typename T>
bool aligned(const void* pointer, int64_t stride) {
  return (uintptr_t)pointer % 16 == 0 && stride * sizeof(T) % 16 == 0;
}
template <typename T>
bool aligned(const Matrix& x) {
  return aligned<T>(x.data, x.stride);
}

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace llama2rt

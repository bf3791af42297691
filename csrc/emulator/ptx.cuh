// Stands in for csrc/cuda/ptx.cuh: the instructions of sm_80 that have no name in CUDA C++.
//
// A cp.async poisons its destination at once and writes it at the wait for its group, so that a
// thread which reads too early, or has not finished reading what was there, gets NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace llama2rt {
namespace emulator {

void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(unsigned groups_left, Site site);
void load_matrix(uint32_t* registers, unsigned count, const void* row, bool transposed);
// d [16, 8] += a [16, 16] @ b [16, 8], spread over the warp as PTX lays it out.
void multiply(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16);

}  // namespace emulator

namespace ptx {

// ---- Asynchronous copies: 16 bytes; zeros where !valid, and then `global` is not read ----
inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, valid);
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int N>
void cp_async_wait(emulator::Site site = emulator::Site::here()) {
  emulator::copy_wait(N, site);
}

// ---- Matrices of 8 x 8 16-bit elements; lanes 8i to 8i + 7 name the rows of matrix i ----
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  emulator::load_matrix(r, 4, shared_row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  emulator::load_matrix(r, 4, shared_row, true);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  emulator::load_matrix(r, 2, shared_row, false);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  emulator::load_matrix(r, 2, shared_row, true);
}

// d += a @ b, T = __nv_bfloat16 or __half
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool is_bf16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(is_bf16 || std::is_same<T, __half>::value);
  emulator::multiply(d, a, b, is_bf16);
}

// ---- Named barriers ----
inline void barrier_sync(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::barrier((unsigned)id, (unsigned)threads, true, site);
}
inline void barrier_arrive(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::barrier((unsigned)id, (unsigned)threads, false, site);
}

// ---- 2^x, with subnormal arguments and results as zero ----
inline float exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace ptx
}  // namespace llama2rt

// Stands in for csrc/cuda/ptx_sm90.cuh: Hopper's asynchronous instructions.
//
// What is asynchronous there happens at a time drawn from the seed here. A tile arrives, and its
// bytes are counted, at any moment after its copy was started. A product is carried out at any
// moment between its issue and the wait for its group, with what then lies in the registers and the
// shared memory that it names, found through its descriptors and the swizzle; its sums read as NaN
// until that wait. Zeros written for the asynchronous units reach memory at the fence.
//
// Left out: clusters, other swizzles than 128 bytes, wgmma.fence beyond its being there at all, and
// that the four warps of a group issue the same products (each warp is followed by itself).
#pragma once

#include <ptx.cuh>

namespace llama2rt {
namespace emulator {

// [tokens, heads, dim] of 16-bit numbers; strides in bytes.
struct alignas(64) TensorMap {
  const unsigned char* base;
  int64_t tokens, heads, dim, token_stride, head_stride;
  int box_tokens;
};
// std::runtime_error for what cuTensorMapEncodeTiled refuses.
void check_tensor_map(const TensorMap&);
void copy_box(void* to, const TensorMap&, uint64_t* barrier, int column, int head, int token);

void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_fence_init();
void mbarrier_arrive(uint64_t* barrier, uint32_t bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

void store_zeros(void* to);
void fence_zeros();

uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride);

struct WarpgroupProduct {
  float* sums;  // columns / 2
  const uint32_t* a_registers;  // null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  unsigned columns;
  bool is_bf16, accumulate;
};
void warpgroup_multiply(WarpgroupProduct);
void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(unsigned pending);

}  // namespace emulator

namespace ptx {

using emulator::Site;

constexpr bool IS_SM90A = true;
inline void trap() { emulator::fail("trap"); }

// ---- mbarrier ----
inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  emulator::mbarrier_init(barrier, count);
}
inline void fence_mbarrier_init(Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::mbarrier_fence_init();
}
inline void mbarrier_arrive(uint64_t* barrier, Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::mbarrier_arrive(barrier, 0);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::mbarrier_wait(barrier, parity);
}

// ---- TMA ----
using TensorMap = emulator::TensorMap;

template <typename T>
TensorMap tensor_map(const void* base, int64_t tokens, int64_t heads, int64_t dim,
                     int64_t token_stride, int64_t head_stride, int box_tokens) {
  static_assert(sizeof(T) == 2);
  const TensorMap map = {static_cast<const unsigned char*>(base), tokens, heads, dim,
                         2 * token_stride, 2 * head_stride, box_tokens};
  emulator::check_tensor_map(map);
  return map;
}
inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, int column, int head,
                     int token) {
  emulator::copy_box(to, map, barrier, column, head, token);
}

// ---- Shared memory and the asynchronous units ----
inline void store_zeros(void* to) { emulator::store_zeros(to); }
inline void fence_proxy_async(Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::fence_zeros();
}

// ---- Registers: as many as anyone likes ----
template <int REGISTERS>
void setmaxnreg_inc() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0);
}
template <int REGISTERS>
void setmaxnreg_dec() {
  setmaxnreg_inc<REGISTERS>();
}
template <int COUNT>
void warpgroup_fence(float (&)[COUNT]) {}
template <int ROWS, int COLUMNS>
void warpgroup_fence(uint32_t (&)[ROWS][COLUMNS]) {}

// ---- wgmma ----
inline uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return emulator::matrix_descriptor(start, leading, stride);
}
inline void wgmma_fence(Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::warpgroup_fence();
}
inline void wgmma_commit(Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::warpgroup_commit();
}
template <int PENDING>
void wgmma_wait(Site site = Site::here()) {
  if (!emulator::left_out(site)) emulator::warpgroup_wait(PENDING);
}
template <typename T, int HALF>
void wgmma_shared(T, float (&sums)[HALF], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(HALF == 32 || HALF == 64);
  emulator::warpgroup_multiply(
      {sums, nullptr, a, b, 2 * HALF, std::is_same<T, __nv_bfloat16>::value, accumulate});
}
template <typename T, int HALF>
void wgmma_registers(T, float (&sums)[HALF], const uint32_t (&a)[4], uint64_t b) {
  static_assert(HALF == 32 || HALF == 64);
  emulator::warpgroup_multiply(
      {sums, a, 0, b, 2 * HALF, std::is_same<T, __nv_bfloat16>::value, true});
}

}  // namespace ptx
}  // namespace llama2rt

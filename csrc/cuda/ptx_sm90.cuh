// Hopper's asynchronous instructions as functions: barriers in shared memory that count arrivals
// and bytes (mbarrier), tile copies by the tensor memory accelerator (TMA), warp-group products
// (wgmma). No other file holds sm_90 PTX. The emulator puts its own header of this name in front
// with -I.
//
// Sections are named as in the PTX ISA, section 9.7 of whose editions differ in their numbers.
// Compiled for another architecture than sm_90a these functions must not be instantiated: kernels
// ask IS_SM90A.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <launch.cuh>
#include <type_traits>

namespace llama2rt::ptx {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool IS_SM90A = true;
#else
constexpr bool IS_SM90A = false;
#endif

// What a kernel compiled for another architecture does instead of computing nothing, unnoticed.
__device__ inline void trap() { asm volatile("trap;"); }

// The address inside the block's shared memory.
__device__ inline uint32_t shared_offset(const void* pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}

// ---- mbarrier (Parallel Synchronization and Communication Instructions: mbarrier) ----
// A phase ends when `count` arrivals have come and as many bytes as were expected. Phases have
// parities 0, 1, 0, ...; before the first has ended, the one of parity 1 counts as ended.

__device__ inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_offset(barrier)), "r"(count)
               : "memory");
}

// Makes initialised barriers visible to the TMA unit (the same, membar / fence).
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_offset(barrier))
               : "memory");
}

// Arrives, and makes the phase wait for `bytes` more of TMA's copies.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_offset(barrier)),
               "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity has ended. try_wait suspends the thread for a while by
// itself, so the loop does not spin.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}\n" ::"r"(shared_offset(barrier)),
      "r"(parity)
      : "memory");
}

// ---- TMA (Tensors; Data Movement and Conversion Instructions: cp.async.bulk.tensor) ----

using TensorMap = CUtensorMap;

// The driver's function, found at the first call: linking libcuda would make the module
// unimportable on a machine without a driver.
inline auto tensor_map_encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
          "cudaGetDriverEntryPoint");
#endif
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: expected 12.0 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}

// A tensor [tokens, heads, dim] of 16-bit numbers, copied in boxes of `box_tokens` tokens of one
// head and 64 of its columns: 128 bytes, the width of the swizzle. Strides count elements; they and
// the address are multiples of 16 bytes. What lies outside the tensor arrives as 0.
template <typename T>
TensorMap tensor_map(const void* base, int64_t tokens, int64_t heads, int64_t dim,
                     int64_t token_stride, int64_t head_stride, int box_tokens) {
  TensorMap map;
  const cuuint64_t extent[] = {(cuuint64_t)dim, (cuuint64_t)heads, (cuuint64_t)tokens};
  const cuuint64_t strides[] = {(cuuint64_t)head_stride * 2, (cuuint64_t)token_stride * 2};
  const cuuint32_t box[] = {64, 1, (cuuint32_t)box_tokens}, step[] = {1, 1, 1};
  const CUresult error = tensor_map_encoder()(
      &map,
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3, const_cast<void*>(base), extent, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string((int)error) +
                             " for a tensor [" + std::to_string(tokens) + ", " +
                             std::to_string(heads) + ", " + std::to_string(dim) + "]");
  return map;
}

// Starts the copy of a box to `to`, 1024-byte aligned; its bytes count towards `barrier`.
__device__ inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, int column,
                                int head, int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_offset(to)),
      "l"(&map), "r"(column), "r"(head), "r"(token), "r"(shared_offset(barrier))
      : "memory");
}

// ---- What the asynchronous units may see of other writes (membar / fence: proxy fences) ----

__device__ inline void store_zeros(void* to) {  // 16 bytes of shared memory
  *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
}

// Orders this thread's writes to shared memory before later reads by wgmma and writes by TMA.
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Warps and their registers ----

// Part of a block (barrier.cta): the barrier opens when `threads` threads have come to it; those
// that only arrive go on at once. Barrier 0 is __syncthreads().
__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of each thread of a warp group from here on (Miscellaneous Instructions: setmaxnreg).
template <int REGISTERS>
__device__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- wgmma (Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions) ----

// Describes a matrix in shared memory with the 128-byte swizzle (Canonical Layouts; Matrix
// Descriptor Format), which repeats every 1024 bytes = 8 rows of 128; `start` may point into a row
// but its pattern begins at a multiple of 1024. K contiguous: `stride` bytes from 8 rows to the
// next 8, `leading` is not used. Rows along K, contiguous along N: `stride` from 8 rows to the next
// 8, `leading` from 64 columns to the next.
__device__ inline uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  auto encode = [](uint32_t bytes) { return (uint64_t)((bytes & 0x3ffff) >> 4); };
  return encode(shared_offset(start)) | encode(leading) << 16 | encode(stride) << 32 |
         (uint64_t)1 << 62;
}

// Between the last access to registers and a product that uses them (wgmma.fence).
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most PENDING of the committed groups are still on their way.
template <int PENDING>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses to registers across this point. It cannot know that a
// product writes its sums only later: that is what wgmma_fence and wgmma_wait are about, and this
// belongs next to them.
template <int COUNT>
__device__ void warpgroup_fence(float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int ROWS, int COLUMNS>
__device__ void warpgroup_fence(uint32_t (&values)[ROWS][COLUMNS]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) asm volatile("" : "+r"(values[i][j])::"memory");
}

// The sums of a product, 64 x N (Register Fragments, accumulator D of m64nNk16): with g = lane / 4
// and c = 2 * (lane % 4), thread (warp, lane) of a warp group holds in sums[i] row 16 * warp + g +
// 8 * (i / 2 % 2) and column 8 * (i / 4) + c + i % 2. A from registers, 64 x 16 (the same,
// multiplicand A): its four registers hold, two neighbours along K each, (row g, column c), (g + 8,
// c), (g, c + 8), (g + 8, c + 8) of its 16 rows.
#define LLAMA2RT_NAMES_32                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "    \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LLAMA2RT_NAMES_64                                                                         \
  LLAMA2RT_NAMES_32                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "  \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LLAMA2RT_SUMS_8(i)                                                                        \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]),      \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define LLAMA2RT_SUMS_FROM(i) \
  LLAMA2RT_SUMS_8(i), LLAMA2RT_SUMS_8(i + 8), LLAMA2RT_SUMS_8(i + 16), LLAMA2RT_SUMS_8(i + 24)
#define LLAMA2RT_SUMS_32 LLAMA2RT_SUMS_FROM(0)
#define LLAMA2RT_SUMS_64 LLAMA2RT_SUMS_FROM(0), LLAMA2RT_SUMS_FROM(32)

// One step of 16 along K, both from shared memory, K contiguous in both:
// sums = A B^T, plus what they held if `accumulate`.
#define LLAMA2RT_SHARED_PRODUCT(T, NAME, N, HALF, A, B, ACCUMULATE)                               \
  __device__ inline void wgmma_shared(T, float (&sums)[HALF], uint64_t a, uint64_t b,             \
                                      bool accumulate) {                                          \
    asm volatile(                                                                                 \
        "{\n"                                                                                     \
        ".reg .pred accumulate;\n"                                                                \
        "setp.ne.b32 accumulate, " ACCUMULATE ", 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." NAME "." NAME " {" LLAMA2RT_NAMES_##HALF \
        "}, " A ", " B ", accumulate, 1, 1, 0, 0;\n"                                              \
        "}\n"                                                                                     \
        : LLAMA2RT_SUMS_##HALF                                                                    \
        : "l"(a), "l"(b), "r"((int)accumulate));                                                  \
  }

// One step of 16 along K, A in registers, N contiguous in B: sums += A B.
#define LLAMA2RT_REGISTER_PRODUCT(T, NAME, N, HALF, A0, A1, A2, A3, B)                            \
  __device__ inline void wgmma_registers(T, float (&sums)[HALF], const uint32_t (&a)[4],          \
                                         uint64_t b) {                                            \
    asm volatile(                                                                                 \
        "{\n"                                                                                     \
        ".reg .pred accumulate;\n"                                                                \
        "setp.eq.b32 accumulate, 0, 0;\n"                                                         \
        "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." NAME "." NAME " {" LLAMA2RT_NAMES_##HALF \
        "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", accumulate, 1, 1, 1;\n"                      \
        "}\n"                                                                                     \
        : LLAMA2RT_SUMS_##HALF                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                    \
  }

#define LLAMA2RT_PRODUCTS(T, NAME)                                                                \
  LLAMA2RT_SHARED_PRODUCT(T, NAME, "64", 32, "%32", "%33", "%34")                                 \
  LLAMA2RT_SHARED_PRODUCT(T, NAME, "128", 64, "%64", "%65", "%66")                                \
  LLAMA2RT_REGISTER_PRODUCT(T, NAME, "64", 32, "%32", "%33", "%34", "%35", "%36")                 \
  LLAMA2RT_REGISTER_PRODUCT(T, NAME, "128", 64, "%64", "%65", "%66", "%67", "%68")

LLAMA2RT_PRODUCTS(__nv_bfloat16, "bf16")
LLAMA2RT_PRODUCTS(__half, "f16")

#undef LLAMA2RT_PRODUCTS
#undef LLAMA2RT_REGISTER_PRODUCT
#undef LLAMA2RT_SHARED_PRODUCT
#undef LLAMA2RT_SUMS_64
#undef LLAMA2RT_SUMS_32
#undef LLAMA2RT_SUMS_FROM
#undef LLAMA2RT_SUMS_8
#undef LLAMA2RT_NAMES_64
#undef LLAMA2RT_NAMES_32

}  // namespace llama2rt::ptx

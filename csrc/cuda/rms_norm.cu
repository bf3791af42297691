// RMSNorm (arXiv:1910.07467) and its gradient, one thread block to a row at a time.
//
//   rstd = 1 / sqrt(mean(x^2) + eps);  y = weight * cast(x * rstd)
//
// A thread holds its part of the row in registers between the two passes, so a row is read from
// memory once; only rows longer than a block can hold are read twice. The weight gradient has two
// stages: each block sums the rows it has seen into a row of `partial`, then the rows of `partial`
// are added in a fixed order. No atomics: equal inputs give equal bits.
//
// Not yet run on a GPU.
#include <launch.cuh>

#include "ops.h"
#include "vec.cuh"

namespace llama2rt {
namespace {

// More threads would leave the backward kernel under 128 registers each, and it would spill.
constexpr int MAX_THREADS = 512;
constexpr int REDUCE_COLUMNS = 32, REDUCE_ROWS = 8;

// Calls body(k, column) for the part of columns [base, base + blockDim.x * WIDTH * PACKS) that
// belongs to this thread; k < PACKS is a constant after unrolling, as register arrays require.
template <int WIDTH, int PACKS, typename Body>
__device__ void for_each_pack(int64_t base, int64_t columns, Body body) {
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int64_t column = base + ((int64_t)k * blockDim.x + threadIdx.x) * WIDTH;
    if (column < columns) body(k, column);
  }
}

template <typename T, int WIDTH, int PACKS>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    rms_norm_forward_kernel(int64_t rows, int64_t columns, const T* x, int64_t x_stride,
                            const T* weight, float eps, T* y, float* rstd_out) {
  const int64_t strip = (int64_t)blockDim.x * WIDTH * PACKS;
  float* warps = (float*)shared_memory;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const T* x_row = x + row * x_stride;
    Pack<T, WIDTH> held[PACKS];
    float squares = 0.0f;
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        held[k] = Pack<T, WIDTH>::load(x_row + column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) squares += held[k][i] * held[k][i];
      });
    // Two buffers in turn: a row's sums are read before the next row's barrier, not after it.
    squares = block_sum(squares, warps + 32 * parity);
    const float rstd = 1.0f / sqrtf(squares / (float)columns + eps);
    if (threadIdx.x == 0) rstd_out[row] = rstd;
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        if (columns > strip) held[k] = Pack<T, WIDTH>::load(x_row + column);
        const Pack<T, WIDTH> scale = Pack<T, WIDTH>::load(weight + column);
        Pack<T, WIDTH> result;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
          result.set(i, to_float(from_float<T>(held[k][i] * rstd)) * scale[i]);
        result.store(y + row * columns + column);
      });
  }
}

// With g = dy * weight and xhat = x * rstd:
//   dx = rstd * (g - xhat * mean(g * xhat)),  partial[block] = sum over the block's rows of dy * xhat
template <typename T, int WIDTH, int PACKS>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    rms_norm_backward_kernel(int64_t rows, int64_t columns, const T* dy, int64_t dy_stride,
                             const T* x, int64_t x_stride, const T* weight, const float* rstd_in,
                             T* dx, float* partial) {
  const int64_t strip = (int64_t)blockDim.x * WIDTH * PACKS;
  const bool one_strip = columns <= strip;
  float* dweight = partial + blockIdx.x * columns;
  float sums[PACKS][WIDTH] = {};
  if (!one_strip)
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int, int64_t column) {
        for (int i = 0; i < WIDTH; ++i) dweight[column + i] = 0.0f;
      });

  float* warps = (float*)shared_memory;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const T *dy_row = dy + row * dy_stride, *x_row = x + row * x_stride;
    const float rstd = rstd_in[row];
    Pack<T, WIDTH> grad[PACKS], held[PACKS];
    float projection = 0.0f;
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        grad[k] = Pack<T, WIDTH>::load(dy_row + column);
        held[k] = Pack<T, WIDTH>::load(x_row + column);
        const Pack<T, WIDTH> scale = Pack<T, WIDTH>::load(weight + column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) projection += grad[k][i] * scale[i] * held[k][i];
      });
    projection = block_sum(projection, warps + 32 * parity) * rstd / (float)columns;
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        if (!one_strip) {
          grad[k] = Pack<T, WIDTH>::load(dy_row + column);
          held[k] = Pack<T, WIDTH>::load(x_row + column);
        }
        const Pack<T, WIDTH> scale = Pack<T, WIDTH>::load(weight + column);
        Pack<T, WIDTH> result;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const float xhat = held[k][i] * rstd;
          result.set(i, (grad[k][i] * scale[i] - xhat * projection) * rstd);
          if (one_strip)
            sums[k][i] += grad[k][i] * xhat;
          else
            dweight[column + i] += grad[k][i] * xhat;
        }
        result.store(dx + row * columns + column);
      });
  }
  if (one_strip)
    for_each_pack<WIDTH, PACKS>(0, columns, [&](int k, int64_t column) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) dweight[column + i] = sums[k][i];
    });
}

template <typename T>
__global__ void __launch_bounds__(REDUCE_COLUMNS * REDUCE_ROWS)
    rms_norm_dweight_kernel(int64_t blocks, int64_t columns, const float* partial, T* dweight) {
  const int64_t column = (int64_t)blockIdx.x * REDUCE_COLUMNS + threadIdx.x;
  float total = 0.0f;
  if (column < columns)
    for (int64_t block = threadIdx.y; block < blocks; block += REDUCE_ROWS)
      total += partial[block * columns + column];
  float* totals = (float*)shared_memory;
  totals[threadIdx.y * REDUCE_COLUMNS + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    for (int i = 1; i < REDUCE_ROWS; ++i) total += totals[i * REDUCE_COLUMNS + threadIdx.x];
    dweight[column] = from_float<T>(total);
  }
}

bool aligned(const void* pointer, int64_t stride_bytes) {
  return (uintptr_t)pointer % 16 == 0 && stride_bytes % 16 == 0;
}

// Calls run(WIDTH, PACKS, threads), both sizes as compile-time constants: 16-byte packs where every
// row allows them, single elements otherwise; 256 threads or fewer before a thread takes more packs.
template <typename T, typename Run>
void with_shape(int64_t columns, bool wide, Run run) {
  auto choose = [&](auto width) {
    const int64_t packs = (columns + width() - 1) / width();
    auto threads = [&](int64_t per_thread) {
      const int64_t wanted = ((packs + per_thread - 1) / per_thread + 31) / 32 * 32;
      return (unsigned)(wanted < 32 ? 32 : wanted > MAX_THREADS ? MAX_THREADS : wanted);
    };
    if (packs <= 256) return run(width, std::integral_constant<int, 1>{}, threads(1));
    if (packs <= 512) return run(width, std::integral_constant<int, 2>{}, threads(2));
    return run(width, std::integral_constant<int, 4>{}, threads(4));
  };
  if (wide)
    choose(std::integral_constant<int, 16 / sizeof(T)>{});
  else
    choose(std::integral_constant<int, 1>{});
}

template <typename T>
void forward(const RmsNorm& a) {
  const int64_t row_bytes = a.columns * sizeof(T);
  const bool wide = aligned(a.x, a.x_stride * sizeof(T)) && aligned(a.weight, row_bytes) &&
                    aligned(a.y, row_bytes);
  const int64_t most = 0x7fffffff;
  const dim3 grid((unsigned)(a.rows < most ? a.rows : most));
  with_shape<T>(a.columns, wide, [&](auto width, auto packs, unsigned threads) {
    launch("rms_norm", rms_norm_forward_kernel<T, width(), packs()>, grid, dim3(threads),
           64 * sizeof(float), (cudaStream_t)a.stream, a.rows, a.columns, (const T*)a.x, a.x_stride,
           (const T*)a.weight, a.eps, (T*)a.y, a.rstd);
  });
}

template <typename T>
void backward(const RmsNormBackward& a) {
  const int64_t row_bytes = a.columns * sizeof(T);
  const bool wide = aligned(a.dy, a.dy_stride * sizeof(T)) && aligned(a.x, a.x_stride * sizeof(T)) &&
                    aligned(a.weight, row_bytes) && aligned(a.dx, row_bytes);
  const auto stream = (cudaStream_t)a.stream;
  with_shape<T>(a.columns, wide, [&](auto width, auto packs, unsigned threads) {
    launch("rms_norm_backward", rms_norm_backward_kernel<T, width(), packs()>,
           dim3((unsigned)a.blocks), dim3(threads), 64 * sizeof(float), stream, a.rows, a.columns,
           (const T*)a.dy, a.dy_stride, (const T*)a.x, a.x_stride, (const T*)a.weight, a.rstd,
           (T*)a.dx, a.partial);
  });
  launch("rms_norm_backward", rms_norm_dweight_kernel<T>,
         dim3((unsigned)((a.columns + REDUCE_COLUMNS - 1) / REDUCE_COLUMNS)),
         dim3(REDUCE_COLUMNS, REDUCE_ROWS), REDUCE_COLUMNS * REDUCE_ROWS * sizeof(float), stream,
         a.blocks, a.columns, (const float*)a.partial, (T*)a.dweight);
}

template <typename Function>
void by_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::fp32: return function(float{});
    case DType::bf16: return function(bf16{});
    case DType::fp16: return function(f16{});
  }
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  if (a.rows == 0 || a.columns == 0) return;
  DeviceGuard guard(a.device);
  by_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

// With no rows the first kernel writes zero sums, and the second makes them a zero gradient.
void rms_norm_backward(const RmsNormBackward& a) {
  if (a.columns == 0) return;
  DeviceGuard guard(a.device);
  by_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace llama2rt

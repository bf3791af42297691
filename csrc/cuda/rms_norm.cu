// RMSNorm (arXiv:1910.07467) and its gradient, one thread block to a row at a time. The addition of
// a residual, and of the gradient that comes to it directly, are part of it: a row of x + residual is
// normalised while it is at hand.
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
// What a thread holds of each operand. The backward pass has three, and sums in fp32 beside them.
constexpr int FORWARD_ELEMENTS = 32, BACKWARD_ELEMENTS = 16, MAX_PACKS = 4;
constexpr int most_packs(int elements, int width) {
  return elements / width < MAX_PACKS ? elements / width : MAX_PACKS;
}
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
                            const T* residual, int64_t residual_stride,
                            const T* __restrict__ weight, float eps, T* __restrict__ y, T* summed,
                            float* rstd_out) {
  const int64_t strip = (int64_t)blockDim.x * WIDTH * PACKS;
  float* warps = (float*)shared_memory;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const T *x_row = x + row * x_stride, *residual_row = residual + row * residual_stride;
    Pack<T, WIDTH> held[PACKS], added[PACKS];
    float squares = 0.0f;
    for (int64_t base = 0; base < columns; base += strip) {
      // All loads of a strip before the first store, which they could not pass.
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        held[k] = Pack<T, WIDTH>::load(x_row + column);
        if (residual) added[k] = Pack<T, WIDTH>::load(residual_row + column);
      });
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        if (residual) {
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) held[k].set(i, held[k][i] + added[k][i]);
          held[k].store(summed + row * columns + column);
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) squares += held[k][i] * held[k][i];
      });
    }
    // Two buffers in turn: a row's sums are read before the next row's barrier, not after it.
    squares = block_sum(squares, warps + 32 * parity);
    const float rstd = 1.0f / sqrtf(squares / (float)columns + eps);
    if (threadIdx.x == 0) rstd_out[row] = rstd;
    const T* again = residual ? summed + row * columns : x_row;
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        if (columns > strip) held[k] = Pack<T, WIDTH>::load(again + column);
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
//   dx = rstd * (g - xhat * mean(g * xhat)) + dsummed,
//   partial[block] = sum over the block's rows of dy * xhat
// ONE_STRIP: the block holds a whole row, and its sums until the end, in registers.
template <typename T, int WIDTH, int PACKS, bool ONE_STRIP>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    rms_norm_backward_kernel(int64_t rows, int64_t columns, const T* dy, int64_t dy_stride,
                             const T* dsummed, int64_t dsummed_stride, const T* x, int64_t x_stride,
                             const T* weight, const float* rstd_in, T* dx, float* partial) {
  const int64_t strip = ONE_STRIP ? columns : (int64_t)blockDim.x * WIDTH * PACKS;
  float* dweight = partial + blockIdx.x * columns;
  float sums[PACKS][WIDTH] = {};
  if (!ONE_STRIP)
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int, int64_t column) {
        for (int i = 0; i < WIDTH; ++i) dweight[column + i] = 0.0f;
      });

  float* warps = (float*)shared_memory;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    const T *dy_row = dy + row * dy_stride, *x_row = x + row * x_stride;
    const T* dsummed_row = dsummed + row * dsummed_stride;
    const float rstd = rstd_in[row];
    Pack<T, WIDTH> grad[PACKS], held[PACKS], extra[PACKS];
    float projection = 0.0f;
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        grad[k] = Pack<T, WIDTH>::load(dy_row + column);
        held[k] = Pack<T, WIDTH>::load(x_row + column);
        if (ONE_STRIP && dsummed) extra[k] = Pack<T, WIDTH>::load(dsummed_row + column);
        const Pack<T, WIDTH> scale = Pack<T, WIDTH>::load(weight + column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) projection += grad[k][i] * scale[i] * held[k][i];
      });
    projection = block_sum(projection, warps + 32 * parity) * rstd / (float)columns;
    for (int64_t base = 0; base < columns; base += strip)
      for_each_pack<WIDTH, PACKS>(base, columns, [&](int k, int64_t column) {
        if (!ONE_STRIP) {
          grad[k] = Pack<T, WIDTH>::load(dy_row + column);
          held[k] = Pack<T, WIDTH>::load(x_row + column);
          if (dsummed) extra[k] = Pack<T, WIDTH>::load(dsummed_row + column);
        }
        const Pack<T, WIDTH> scale = Pack<T, WIDTH>::load(weight + column);
        Pack<T, WIDTH> result;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const float xhat = held[k][i] * rstd, direct = dsummed ? extra[k][i] : 0.0f;
          result.set(i, (grad[k][i] * scale[i] - xhat * projection) * rstd + direct);
          if (ONE_STRIP)
            sums[k][i] += grad[k][i] * xhat;
          else
            dweight[column + i] += grad[k][i] * xhat;
        }
        result.store(dx + row * columns + column);
      });
  }
  if (ONE_STRIP)
    for_each_pack<WIDTH, PACKS>(0, columns, [&](int k, int64_t column) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) dweight[column + i] = sums[k][i];
    });
}

template <typename T>
__global__ void __launch_bounds__(REDUCE_COLUMNS * REDUCE_ROWS)
    rms_norm_dweight_kernel(int64_t blocks, int64_t columns, const float* partial, T* dweight) {
  const int64_t column = (int64_t)blockIdx.x * REDUCE_COLUMNS + threadIdx.x;
  float acc = 0.0f;
  if (column < columns)
    for (int64_t block = threadIdx.y; block < blocks; block += REDUCE_ROWS)
      acc += partial[block * columns + column];
  float* sums = (float*)shared_memory;
  sums[threadIdx.y * REDUCE_COLUMNS + threadIdx.x] = acc;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    for (int i = 1; i < REDUCE_ROWS; ++i) acc += sums[i * REDUCE_COLUMNS + threadIdx.x];
    dweight[column] = from_float<T>(acc);
  }
}

// Calls run(WIDTH, PACKS, threads), both sizes as compile-time constants: 16-byte packs where every
// row allows them, single elements otherwise; 256 threads or fewer before a thread takes more packs.
template <typename T, int ELEMENTS, typename Run>
void with_shape(int64_t columns, bool wide, Run run) {
  by_width<T>(wide, [&](auto width) {
    const int64_t packs = divide_up(columns, width());
    auto threads = [&](int64_t per_thread) {
      const int64_t wanted = divide_up(divide_up(packs, per_thread), 32) * 32;
      return (unsigned)(wanted > MAX_THREADS ? MAX_THREADS : wanted);
    };
    if constexpr (width() > 1) {
      if (packs <= 256) return run(width, std::integral_constant<int, 1>{}, threads(1));
      if (packs <= 512) return run(width, std::integral_constant<int, 2>{}, threads(2));
    }
    constexpr int MOST = most_packs(ELEMENTS, width());
    run(width, std::integral_constant<int, MOST>{}, threads(MOST));
  });
}

template <typename T>
void forward(const RmsNorm& a) {
  const bool wide = aligned<T>(a.x) && aligned<T>(a.residual) &&
                    aligned<T>(a.weight, a.columns) && aligned<T>(a.y, a.columns) &&
                    aligned<T>(a.summed, a.columns);
  const int64_t most = 0x7fffffff;
  const dim3 grid((unsigned)(a.rows < most ? a.rows : most));
  with_shape<T, FORWARD_ELEMENTS>(a.columns, wide, [&](auto width, auto packs, unsigned threads) {
    launch<rms_norm_forward_kernel<T, width(), packs()>>(
        "rms_norm", grid, dim3(threads), SharedBytes<64 * sizeof(float)>{}, (cudaStream_t)a.stream,
        a.rows, a.columns, (const T*)a.x.data, a.x.stride, (const T*)a.residual.data,
        a.residual.stride, (const T*)a.weight, a.eps, (T*)a.y, (T*)a.summed, a.rstd);
  });
}

template <typename T>
void backward(const RmsNormBackward& a) {
  const bool wide = aligned<T>(a.dy) && aligned<T>(a.dsummed) && aligned<T>(a.x) &&
                    aligned<T>(a.weight, a.columns) &&
                    aligned<T>(a.dx, a.columns);
  const auto stream = (cudaStream_t)a.stream;
  with_shape<T, BACKWARD_ELEMENTS>(a.columns, wide, [&](auto width, auto packs, unsigned threads) {
    constexpr int WIDTH = width(), PACKS = packs();
    auto run = [&](auto one_strip) {
      launch<rms_norm_backward_kernel<T, WIDTH, PACKS, one_strip()>>(
          "rms_norm_backward", dim3((unsigned)a.blocks), dim3(threads),
          SharedBytes<64 * sizeof(float)>{}, stream, a.rows, a.columns, (const T*)a.dy.data,
          a.dy.stride, (const T*)a.dsummed.data, a.dsummed.stride, (const T*)a.x.data, a.x.stride,
          (const T*)a.weight, a.rstd, (T*)a.dx, a.partial);
    };
    if constexpr (PACKS == most_packs(BACKWARD_ELEMENTS, WIDTH))
      if (a.columns > (int64_t)threads * WIDTH * PACKS) return run(std::false_type{});
    run(std::true_type{});
  });
  launch<rms_norm_dweight_kernel<T>>(
      "rms_norm_backward", dim3((unsigned)divide_up(a.columns, REDUCE_COLUMNS)),
      dim3(REDUCE_COLUMNS, REDUCE_ROWS),
      SharedBytes<REDUCE_COLUMNS * REDUCE_ROWS * sizeof(float)>{}, stream, a.blocks, a.columns,
      (const float*)a.partial, (T*)a.dweight);
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

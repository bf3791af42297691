// SiLU(gate) * up (arXiv:2002.05202) and its gradient: nothing but memory traffic.
//
//   y = gate s up,  with s = sigmoid(gate)
//   dup = dy gate s;  dgate = dy up s (1 + gate (1 - s))
//
// The backward pass computes s again rather than read anything the forward pass would have to write.
// The rows are cut into tiles, and a fixed number of blocks goes through them; the loads of a
// thread's packs come before its first store. Dense operands are one long row.
//
// Not yet run on a GPU.
#include <launch.cuh>

#include "vec.cuh"

namespace llama2rt {
namespace {

constexpr int THREADS = 128;
constexpr int PACKS = 2;  // of each operand, in flight

// Full precision for fp32; the fast functions' error, a few units of 2^-22, is lost in a 16-bit
// result, and their cost decides whether memory is what a 16-bit kernel waits for.
template <typename T>
__device__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

// Calls body(row, column) with the first column of each of this thread's packs, tile after tile.
template <int WIDTH, typename Tile>
__device__ void for_each_tile(int64_t rows, int64_t columns, Tile body) {
  constexpr int64_t TILE = THREADS * WIDTH * PACKS;
  const int64_t across = (columns - 1) / TILE + 1, tiles = rows * across;
  const bool narrow = tiles <= 0xffffffff;  // a 64-bit division costs a hundred instructions
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = narrow ? (unsigned)tile / (unsigned)across : tile / across;
    body(row, (tile - row * across) * TILE + threadIdx.x * WIDTH);
  }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    swiglu_forward_kernel(int64_t rows, int64_t columns, const T* gate, int64_t gate_stride,
                          const T* up, int64_t up_stride, T* y) {
  using Values = Pack<T, WIDTH>;
  for_each_tile<WIDTH>(rows, columns, [&](int64_t row, int64_t first) {
    const T *gate_row = gate + row * gate_stride, *up_row = up + row * up_stride;
    Values g[PACKS], u[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int64_t column = first + k * THREADS * WIDTH;
      if (column >= columns) break;
      g[k] = Values::load(gate_row + column);
      u[k] = Values::load(up_row + column);
    }
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int64_t column = first + k * THREADS * WIDTH;
      if (column >= columns) break;
      Values result;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) result.set(i, g[k][i] * sigmoid<T>(g[k][i]) * u[k][i]);
      result.store(y + row * columns + column);
    }
  });
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    swiglu_backward_kernel(int64_t rows, int64_t columns, const T* dy, int64_t dy_stride,
                           const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,
                           T* dgate, T* dup) {
  using Values = Pack<T, WIDTH>;
  for_each_tile<WIDTH>(rows, columns, [&](int64_t row, int64_t first) {
    const T *dy_row = dy + row * dy_stride, *gate_row = gate + row * gate_stride;
    const T* up_row = up + row * up_stride;
    Values d[PACKS], g[PACKS], u[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int64_t column = first + k * THREADS * WIDTH;
      if (column >= columns) break;
      d[k] = Values::load(dy_row + column);
      g[k] = Values::load(gate_row + column);
      u[k] = Values::load(up_row + column);
    }
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int64_t column = first + k * THREADS * WIDTH;
      if (column >= columns) break;
      Values of_gate, of_up;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float s = sigmoid<T>(g[k][i]);
        of_up.set(i, d[k][i] * g[k][i] * s);
        of_gate.set(i, d[k][i] * u[k][i] * s * (1.0f + g[k][i] * (1.0f - s)));
      }
      of_gate.store(dgate + row * columns + column);
      of_up.store(dup + row * columns + column);
    }
  });
}

template <int WIDTH>
dim3 grid(int64_t rows, int64_t columns, int64_t blocks) {
  const int64_t tiles = rows * divide_up(columns, THREADS * WIDTH * PACKS);
  return dim3((unsigned)(tiles < blocks ? tiles : blocks));
}

template <typename T>
void forward(const SwiGlu& a) {
  const bool wide = a.columns * sizeof(T) % 16 == 0 && aligned<T>(a.gate) &&
                    aligned<T>(a.up) && aligned<T>(a.y, a.columns);
  by_width<T>(wide, [&](auto width) {
    launch<swiglu_forward_kernel<T, width()>>(
        "swiglu", grid<width()>(a.rows, a.columns, a.blocks), dim3(THREADS), SharedBytes<0>{},
        (cudaStream_t)a.stream, a.rows, a.columns, (const T*)a.gate.data, a.gate.stride,
        (const T*)a.up.data, a.up.stride, (T*)a.y);
  });
}

template <typename T>
void backward(const SwiGluBackward& a) {
  const bool wide = a.columns * sizeof(T) % 16 == 0 && aligned<T>(a.dy) &&
                    aligned<T>(a.gate) && aligned<T>(a.up) &&
                    aligned<T>(a.dgate, a.columns) && aligned<T>(a.dup, a.columns);
  by_width<T>(wide, [&](auto width) {
    launch<swiglu_backward_kernel<T, width()>>(
        "swiglu_backward", grid<width()>(a.rows, a.columns, a.blocks), dim3(THREADS),
        SharedBytes<0>{}, (cudaStream_t)a.stream, a.rows, a.columns, (const T*)a.dy.data,
        a.dy.stride, (const T*)a.gate.data, a.gate.stride, (const T*)a.up.data, a.up.stride,
        (T*)a.dgate, (T*)a.dup);
  });
}

}  // namespace

void swiglu(const SwiGlu& a) {
  if (a.rows == 0 || a.columns == 0) return;
  DeviceGuard guard(a.device);
  by_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void swiglu_backward(const SwiGluBackward& a) {
  if (a.rows == 0 || a.columns == 0) return;
  DeviceGuard guard(a.device);
  by_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace llama2rt

// The softmax of token_logprob on one tile of logits: some columns of a [T, V] matrix that never
// exists whole. Forward folds a tile into the running statistics of its rows (online softmax,
// arXiv:1805.02867); backward turns its logits into their gradients, in place or not, rounded once.
// The matrix products around it are cuBLAS's, through torch. Everything but the tile is fp32.
//
// Bound by memory, with a row of a few thousand columns to a warp: no thread block shares anything,
// so there is no barrier, and a row's sums have one order: equal calls give equal bits.
//
// Not yet run on a GPU.
#include <launch.cuh>
#include <ptx.cuh>

#include <stdexcept>

#include "ops.h"
#include "vec.cuh"

namespace llama2rt {
namespace {

constexpr int WARPS = 4;  // rows of a thread block
constexpr int PACKS = 4;  // 16-byte loads that a lane has in flight

// Calls body(pack, column) for a row, PACKS packs of 16 bytes a lane at a time, all of them loaded
// before the first is used; then for what is left of the row, in packs of one element.
template <typename T, typename Body>
__device__ void for_each_pack(const T* row, int64_t columns, Body body) {
  constexpr int WIDTH = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int64_t packs = columns / WIDTH;
  for (int64_t base = lane; base < packs; base += 32 * PACKS) {
    Pack<T, WIDTH> held[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (base + 32 * k < packs) held[k] = Pack<T, WIDTH>::load(row + (base + 32 * k) * WIDTH);
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (base + 32 * k < packs) body(held[k], (base + 32 * k) * WIDTH);
  }
  const int64_t column = packs * WIDTH + lane;
  if (column < columns) {
    auto last = Pack<T, 1>::load(row + column);
    body(last, column);
  }
}

// Of some logits: the largest, and over x = (logit - largest) * scale the sums of exp(x) and of
// x exp(x).
template <bool ENTROPY>
struct Statistics {
  float row_max, row_sum, weighted_sum;

  // The same sums relative to another maximum, at least as large.
  __device__ void raise(float higher, float scale) {
    const float shift = (row_max - higher) * scale;  // may be infinite, and then keeps nothing
    const float decay = ptx::exp2(shift * LOG2E);
    row_sum *= decay;
    if (ENTROPY) weighted_sum = row_sum > 0.0f ? weighted_sum * decay + shift * row_sum : 0.0f;
    row_max = higher;
  }

  template <typename T, int WIDTH>
  __device__ void add(const Pack<T, WIDTH>& logits, float scale) {
    float higher = row_max;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) higher = fmaxf(higher, logits[i]);
    raise(higher, scale);
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      // The maximum itself gives exactly 1, so that no row_sum is below 1 and no logprob above 0.
      const float x = logits[i] - higher, e = ptx::exp2(x * (scale * LOG2E));
      sum += e;
      if (ENTROPY) weighted += e * x;
    }
    row_sum += sum;
    if (ENTROPY) weighted_sum += weighted * scale;
  }

  // Over all lanes, for each of them.
  __device__ void merge(float scale) {
    raise(largest_of_lanes(row_max, 1, 16), scale);
    row_sum = sum_of_lanes(row_sum, 1, 16);
    if (ENTROPY) weighted_sum = sum_of_lanes(weighted_sum, 1, 16);
  }
};

template <typename T, bool ENTROPY>
__global__ void __launch_bounds__(32 * WARPS) token_logprob_kernel(TokenLogprob a) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= a.rows) return;
  const T* logits = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
  const bool first_lane = threadIdx.x % 32 == 0;
  // What earlier tiles left counts in one lane.
  Statistics<ENTROPY> statistics = {a.row_max[row], first_lane ? a.row_sum[row] : 0.0f,
                                    ENTROPY && first_lane ? a.weighted_sum[row] : 0.0f};
  for_each_pack(logits, a.columns,
                [&](const auto& pack, int64_t) { statistics.add(pack, a.scale); });
  statistics.merge(a.scale);
  if (!first_lane) return;
  a.row_max[row] = statistics.row_max;
  a.row_sum[row] = statistics.row_sum;
  if (ENTROPY) a.weighted_sum[row] = statistics.weighted_sum;
  const int64_t column = a.targets[row] - a.first;
  if (0 <= column && column < a.columns) a.target_logit[row] = to_float(logits[column]);
}

// With g and h the upstream gradients of logprob and entropy, both over the temperature:
//   dlogits = (onehot - p) * g - p * (log p + entropy) * h
template <typename T, bool ENTROPY>
__global__ void __launch_bounds__(32 * WARPS)
    token_logprob_backward_kernel(TokenLogprobBackward a) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= a.rows) return;
  const T* logits = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
  T* dlogits = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
  const int64_t target = a.targets[row] - a.first;
  const bool predicted = a.targets[row] >= 0;
  const float lse = a.lse[row], g = a.dlogprob[row] * a.scale;
  const float h = ENTROPY ? a.dentropy[row] * a.scale : 0.0f;
  const float entropy = ENTROPY ? a.entropy[row] : 0.0f;
  for_each_pack(logits, a.columns, [&](auto& pack, int64_t column) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof(pack) / sizeof(T)); ++i) {
      // Rounded as the maximum inside lse was: where one logit is all, its log p is then exactly 0.
      const float log_p = __fmul_rn(pack[i], a.scale) - lse;
      float gradient = -ptx::exp2(log_p * LOG2E) * (ENTROPY ? g + h * (log_p + entropy) : g);
      if (column + i == target) gradient += g;
      pack.set(i, predicted ? gradient : 0.0f);
    }
    pack.store(dlogits + column);
  });
}

template <typename T>
void check_rows(const void* first, int64_t stride) {
  if (((uintptr_t)first | (uintptr_t)(stride * sizeof(T))) % 16 != 0)
    throw std::runtime_error("token_logprob: expected rows of logits aligned to 16 bytes");
}

template <typename T, bool ENTROPY>
void run(const TokenLogprob& a, dim3 grid) {
  launch<token_logprob_kernel<T, ENTROPY>>("token_logprob", grid, dim3(32 * WARPS),
                                           SharedBytes<0>{}, (cudaStream_t)a.stream, a);
}
template <typename T, bool ENTROPY>
void run(const TokenLogprobBackward& a, dim3 grid) {
  check_rows<T>(a.dlogits, a.dlogits_stride);
  launch<token_logprob_backward_kernel<T, ENTROPY>>("token_logprob_backward", grid,
                                                    dim3(32 * WARPS), SharedBytes<0>{},
                                                    (cudaStream_t)a.stream, a);
}

template <typename T, typename Arguments>
void with_entropy(const Arguments& a, bool entropy) {
  check_rows<T>(a.logits.data, a.logits.stride);
  const dim3 grid((unsigned)((a.rows + WARPS - 1) / WARPS));
  entropy ? run<T, true>(a, grid) : run<T, false>(a, grid);
}

template <typename Arguments>
void with_dtype(const Arguments& a, bool entropy) {
  if (a.rows == 0 || a.columns == 0) return;
  DeviceGuard guard(a.device);
  switch (a.dtype) {
    case DType::fp32: return with_entropy<float>(a, entropy);
    case DType::bf16: return with_entropy<bf16>(a, entropy);
    case DType::fp16: return with_entropy<f16>(a, entropy);
  }
}

}  // namespace

void token_logprob(const TokenLogprob& a) { with_dtype(a, a.weighted_sum != nullptr); }
void token_logprob_backward(const TokenLogprobBackward& a) { with_dtype(a, a.dentropy != nullptr); }

}  // namespace llama2rt

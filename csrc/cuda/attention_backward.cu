// The gradients of attention over packed documents, for tensor cores of the sm_80 family and later.
//
//   p = exp(s - lse);  dv = p^T dout;  ds = p * (dout v^T - delta);  dq = ds k;  dk = ds^T q
//
// with delta = sum(dout * out) of each row. One kernel owns the rows of dq, one the keys of dk and
// dv: each forms s again, seven products in place of five, and in return nothing is summed across
// blocks. No atomics: equal inputs give equal bits.
//
// Both walk alike: two tiles stay in shared memory, and of the two that stream past, the one used
// twice (k for dq, q for dk) has two slots, the other one. Its next tile is copied while the
// second half of a step computes.
//
// Formulas: FlashAttention-2 (Dao 2023, arXiv:2307.08691), section 3.1. Not yet run on a GPU.
#include "attention.cuh"

namespace llama2rt {
namespace {

constexpr int DELTA_LANES = 8, DELTA_THREADS = 256;

struct Shape {
  int resident, streamed, warps, blocks;  // rows of the tiles; blocks to a multiprocessor
};

// By padded head dimension: 16 resident rows a warp, for the products of a step are three to five
// accumulators at once. Chosen from registers, and from shared memory for `blocks` blocks in 164 KB
// and one in 99 KB, not yet by time.
constexpr Shape dq_shape(int dim) {
  if (dim <= 64) return {64, 64, 4, 3};
  return dim <= 128 ? Shape{64, 64, 4, 2} : Shape{64, 16, 4, 1};
}
// Two accumulators of 256 columns exceed the registers: there two warps share the resident rows,
// form the same s, and sum half of the columns each.
constexpr Shape dkdv_shape(int dim) {
  if (dim <= 64) return {64, 64, 4, 2};
  return dim <= 128 ? Shape{64, 32, 4, 2} : Shape{64, 16, 8, 1};
}

constexpr size_t shared_elements(const Shape& s, int dim) {
  return (size_t)(2 * s.resident + 3 * s.streamed) * dim;
}

// delta [heads, tokens]: eight lanes to a row.
template <typename T>
__global__ void __launch_bounds__(DELTA_THREADS)
    attention_delta_kernel(const AttentionBackward b) {
  const Attention& a = b;
  const int64_t item = ((int64_t)blockIdx.x * DELTA_THREADS + threadIdx.x) / DELTA_LANES;
  const int64_t token = item / a.heads, head = item % a.heads;
  float sum = 0.0f;
  if (token < a.tokens) {
    const T* const dout = row_of<T>(b.dout, token, head);
    const T* const out = (const T*)a.out + item * a.head_dim;
    for (int64_t i = threadIdx.x % DELTA_LANES * 8; i < a.head_dim; i += DELTA_LANES * 8) {
      const auto x = Pack<T, 8>::load(dout + i), y = Pack<T, 8>::load(out + i);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
    }
  }
  sum = sum_of_lanes(sum, 1, DELTA_LANES / 2);
  if (token < a.tokens && threadIdx.x % DELTA_LANES == 0) b.delta[head * a.tokens + token] = sum;
}

template <typename T, int DIM>
__global__ void __launch_bounds__(32 * dq_shape(DIM).warps, dq_shape(DIM).blocks)
    attention_dq_kernel(const AttentionBackward b) {
  constexpr int ROWS = dq_shape(DIM).resident, KEYS = dq_shape(DIM).streamed;
  constexpr int THREADS = 32 * dq_shape(DIM).warps;
  static_assert(ROWS == 16 * dq_shape(DIM).warps);
  const Attention& a = b;
  const QueryTile tile = QueryTile::make<ROWS, KEYS>(a);
  const QueryRows& rows = tile.rows;
  if (rows.count <= 0) return;
  T* const q_tile = reinterpret_cast<T*>(shared_memory);
  T* const dout_tile = q_tile + ROWS * DIM;
  T* const k_tiles = dout_tile + ROWS * DIM;
  T* const v_tile = k_tiles + 2 * KEYS * DIM;
  const int dim = (int)a.head_dim, lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;

  auto load_keys = [&](T* to, const Heads& x, int start) {
    const T* const source = row_of<T>(x, tile.key, tile.head);
    if (start < tile.end)
      load_tile<KEYS, DIM, THREADS>(to, dim, [&](int r) {
        return start + r < tile.keys ? source + (start + r) * x.token_stride : nullptr;
      });
    ptx::cp_async_commit();
  };
  if (tile.end > 0) {
    load_tile<ROWS, DIM, THREADS>(q_tile, dim, [&](int r) { return rows.row<T>(a.q, r); });
    load_tile<ROWS, DIM, THREADS>(dout_tile, dim, [&](int r) { return rows.row<T>(b.dout, r); });
  }
  load_keys(k_tiles, a.k, 0);
  load_keys(v_tile, a.v, 0);

  int last[2];
  float lse[2], delta[2], acc[1][DIM / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first_row + half * 8 + lane / 4;
    last[half] = tile.last(r);
    lse[half] = r < rows.count ? a.lse[rows.statistic(a.tokens, r)] * LOG2E : 0.0f;
    delta[half] = r < rows.count ? b.delta[rows.statistic(a.tokens, r)] : 0.0f;
  }
  const float scale = a.scale * LOG2E;
  const int warp_end =
      first_row >= rows.count ? 0 : min(tile.end, tile.last(first_row + 15) + 1);

  int parity = 0;
  for (int start = 0; start < tile.end; start += KEYS, parity ^= 1) {
    const bool busy = start < warp_end;
    const T* const k_tile = k_tiles + parity * KEYS * DIM;
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_keys(k_tiles + (parity ^ 1) * KEYS * DIM, a.k, start + KEYS);
    float scores[1][KEYS / 8][4] = {}, ds[1][KEYS / 8][4] = {};
    if (busy) {
      multiply_rows<1, KEYS, DIM>(scores, q_tile, first_row, k_tile);
      multiply_rows<1, KEYS, DIM>(ds, dout_tile, first_row, v_tile);
    }
    __syncthreads();  // all have read the values
    load_keys(v_tile, a.v, start + KEYS);
    if (!busy) continue;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float p = ptx::exp2(fmaf(scores[0][n][i], scale, -lse[i / 2]));
        ds[0][n][i] = p * (ds[0][n][i] - delta[i / 2]);
      }
    if (start + KEYS > tile.full) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (start + n * 8 + lane % 4 * 2 + i % 2 > last[i / 2]) ds[0][n][i] = 0.0f;
    }
    uint32_t rounded[1][KEYS / 16][4];
    operand<T>(rounded, ds);
    multiply_columns<1, KEYS, DIM, DIM>(acc, rounded, k_tile);
  }
  store_rows<1, DIM, DIM>(
      q_tile, first_row, acc, 0, dim, [&](int, int) { return a.scale; },
      [&](int r) { return rows.dense_row<T>(b.dq, a.heads, dim, r); });
}

// Scores are transposed, [keys, rows], as both products need them. A row that sees no key has no
// part in any tile: its log-sum-exp of minus infinity is never used.
template <typename T, int DIM>
__global__ void __launch_bounds__(32 * dkdv_shape(DIM).warps, dkdv_shape(DIM).blocks)
    attention_dkdv_kernel(const AttentionBackward b) {
  constexpr int KEYS = dkdv_shape(DIM).resident, ROWS = dkdv_shape(DIM).streamed;
  constexpr int THREADS = 32 * dkdv_shape(DIM).warps, PARTS = 16 * dkdv_shape(DIM).warps / KEYS;
  constexpr int COLUMNS = DIM / PARTS;
  static_assert(ROWS <= THREADS);
  const Attention& a = b;
  const KeyTile tile = KeyTile::make<KEYS>(a);
  if (tile.count <= 0) return;
  T* const k_tile = reinterpret_cast<T*>(shared_memory);
  T* const v_tile = k_tile + KEYS * DIM;
  T* const q_tiles = v_tile + KEYS * DIM;
  T* const dout_tile = q_tiles + 2 * ROWS * DIM;
  float* const statistics = reinterpret_cast<float*>(dout_tile + ROWS * DIM);  // [2][2][ROWS]
  const int dim = (int)a.head_dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_key = warp % (KEYS / 16) * 16;
  const int first_chunk = warp / (KEYS / 16) * (COLUMNS / 8);

  auto load_rows = [&](T* to, const Heads& x, int start) {
    if (start < tile.rows) {
      const QueryRows rows = tile.rows_from(start, ROWS);
      load_tile<ROWS, DIM, THREADS>(to, dim, [&](int r) { return rows.row<T>(x, r); });
    }
    ptx::cp_async_commit();
  };
  // One thread reads a row's log-sum-exp and delta, and keeps them until their slot is free. A row
  // past the end has zeros for q and dout, and so adds nothing whatever its probabilities.
  float lse, delta;
  auto read_statistics = [&](int start) {
    const QueryRows rows = tile.rows_from(start, ROWS);
    const bool exists = (int)threadIdx.x < rows.count;
    lse = exists ? a.lse[rows.statistic(a.tokens, threadIdx.x)] * LOG2E : 0.0f;
    delta = exists ? b.delta[rows.statistic(a.tokens, threadIdx.x)] : 0.0f;
  };
  auto write_statistics = [&](int parity) {
    if (threadIdx.x >= ROWS) return;
    statistics[parity * 2 * ROWS + threadIdx.x] = lse;
    statistics[parity * 2 * ROWS + ROWS + threadIdx.x] = delta;
  };

  if (tile.begin < tile.rows) {
    load_tile<KEYS, DIM, THREADS>(k_tile, dim, [&](int r) { return tile.row<T>(a.k, r); });
    load_tile<KEYS, DIM, THREADS>(v_tile, dim, [&](int r) { return tile.row<T>(a.v, r); });
  }
  load_rows(q_tiles, a.q, tile.begin);
  load_rows(dout_tile, b.dout, tile.begin);
  read_statistics(tile.begin);
  write_statistics(0);

  float dk[1][COLUMNS / 8][4] = {}, dv[1][COLUMNS / 8][4] = {};
  const float scale = a.scale * LOG2E;
  int parity = 0;
  for (int start = tile.begin; start < tile.rows; start += ROWS, parity ^= 1) {
    const QueryRows rows = tile.rows_from(start, ROWS);
    // The last key that row r sees, counted from the warp's first.
    auto last = [&](int r) {
      return a.causal ? start / tile.group + rows.step(r) + tile.shift - tile.first - first_key
                      : tile.count;
    };
    const bool busy = first_key < tile.count && last(ROWS - 1) >= 0;
    const T* const q_tile = q_tiles + parity * ROWS * DIM;
    const float* const row_lse = statistics + parity * 2 * ROWS;
    const float* const row_delta = row_lse + ROWS;
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_rows(q_tiles + (parity ^ 1) * ROWS * DIM, a.q, start + ROWS);
    read_statistics(start + ROWS);
    float p[1][ROWS / 8][4] = {}, ds[1][ROWS / 8][4] = {};
    uint32_t rounded[1][ROWS / 16][4];
    if (busy) {
      multiply_rows<1, ROWS, DIM>(p, k_tile, first_key, q_tile);
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          p[0][n][i] =
              ptx::exp2(fmaf(p[0][n][i], scale, -row_lse[n * 8 + lane % 4 * 2 + i % 2]));
      if (start < tile.full) {
#pragma unroll
        for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (lane / 4 + i / 2 * 8 > last(n * 8 + lane % 4 * 2 + i % 2)) p[0][n][i] = 0.0f;
      }
      multiply_rows<1, ROWS, DIM>(ds, v_tile, first_key, dout_tile);
      operand<T>(rounded, p);
      multiply_columns<1, ROWS, COLUMNS, DIM>(dv, rounded, dout_tile, first_chunk);
    }
    __syncthreads();  // all have read dout
    load_rows(dout_tile, b.dout, start + ROWS);
    write_statistics(parity ^ 1);
    if (!busy) continue;
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - row_delta[n * 8 + lane % 4 * 2 + i % 2]);
    operand<T>(rounded, ds);
    multiply_columns<1, ROWS, COLUMNS, DIM>(dk, rounded, q_tile, first_chunk);
  }
  // The keys and values, read for the last time before the last barrier, make room for results.
  store_rows<1, COLUMNS, DIM>(
      k_tile, first_key, dk, first_chunk, dim, [&](int, int) { return a.scale; },
      [&](int r) { return tile.dense_row<T>(b.dk, a.kv_heads, dim, r); });
  store_rows<1, COLUMNS, DIM>(
      v_tile, first_key, dv, first_chunk, dim, [&](int, int) { return 1.0f; },
      [&](int r) { return tile.dense_row<T>(b.dv, a.kv_heads, dim, r); });
}

template <typename T, int DIM>
void run(const AttentionBackward& b) {
  const Attention& a = b;
  const auto stream = (cudaStream_t)a.stream;
  if (a.tokens > 0) {
    const int64_t threads = a.tokens * a.heads * DELTA_LANES;
    launch<attention_delta_kernel<T>>("attention_delta_kernel",
                                      grid_of((threads + DELTA_THREADS - 1) / DELTA_THREADS),
                                      dim3(DELTA_THREADS), SharedBytes<0>{}, stream, b);
    constexpr Shape s = dq_shape(DIM);
    const int64_t tiles = tiles_for(a.tokens * (a.heads / a.kv_heads), s.resident, a.documents);
    launch<attention_dq_kernel<T, DIM>>("attention_dq_kernel", grid_of(tiles * a.kv_heads),
                                        dim3(32 * s.warps),
                                        SharedBytes<shared_elements(s, DIM) * sizeof(T)>{}, stream,
                                        b);
  }
  if (a.keys > 0) {
    constexpr Shape s = dkdv_shape(DIM);
    constexpr size_t BYTES =
        shared_elements(s, DIM) * sizeof(T) + 4 * s.streamed * sizeof(float);
    launch<attention_dkdv_kernel<T, DIM>>(
        "attention_dkdv_kernel",
        grid_of(tiles_for(a.keys, s.resident, a.documents) * a.kv_heads), dim3(32 * s.warps),
        SharedBytes<BYTES>{}, stream, b);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& b) {
  DeviceGuard guard(b.device);
  if (b.dtype == DType::fp32) return attention_backward_fp32(b);
  by_shape(b, [&](auto t, auto dim) { run<decltype(t), dim()>(b); });
}

}  // namespace llama2rt

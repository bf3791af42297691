// Attention over packed documents and its gradients in fp32, on the ordinary units: tensor cores
// would round the operands to 10 bits. For tests and for small fp32 models; nothing here is tuned.
//
// One scheme in all three kernels. A warp owns RESIDENT rows (queries, or keys for dk and dv); the
// other side streams past, 32 rows at a time, one to a lane, and a lane forms its row's products
// with all of the warp's. For the sums over those 32 rows the lanes take columns instead, and the
// weights change hands in shared memory.
//
// A tile is summed apart from the total of the tiles before it, which keeps long sums as exact as a
// blocked product, and scores are not rounded between the scale and the exponential: where scores
// are large, that would be most of a gradient's error. Not yet run on a GPU.
#include <math.h>

#include "attention.cuh"

namespace llama2rt {
namespace {

constexpr int WARPS = 4, RESIDENT = 2, ROWS = WARPS * RESIDENT, LANES = 32;
constexpr int THREADS = WARPS * LANES, MAX_DIM = 256, MAX_COLUMNS = MAX_DIM / LANES;

using Four = Pack<float, 4>;

// Floats from one row of a tile to the next: with 4 more than a multiple of 32, eight lanes that
// read four floats of eight rows meet in no bank.
__host__ __device__ constexpr int pitch(int64_t dim) { return (int)(dim + 31) / 32 * 32 + 4; }

// A tile of `rows` rows; row(r) is where row r lies, null for a row of zeros.
template <typename Row>
__device__ void load(float* tile, int rows, int dim, Row row) {
  for (int i = threadIdx.x; i < rows * (dim / 4); i += THREADS) {
    const int r = i / (dim / 4), column = i % (dim / 4) * 4;
    const float* source = row(r);
    Four four{};
    if (source != nullptr) four = Four::load(source + column);
    four.store(tile + r * pitch(dim) + column);
  }
}

// Products of the warp's rows, from `resident` on, with the lane's row of `streamed`.
__device__ inline void multiply(float (&product)[RESIDENT], const float* resident,
                                const float* streamed, int dim) {
  Four sum[RESIDENT] = {};
  const float* mine = streamed + threadIdx.x % LANES * pitch(dim);
  for (int column = 0; column < dim; column += 4) {
    const Four y = Four::load(mine + column);
#pragma unroll
    for (int r = 0; r < RESIDENT; ++r) {
      const Four x = Four::load(resident + r * pitch(dim) + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[r].lanes[i] = fmaf(x[i], y[i], sum[r][i]);
    }
  }
#pragma unroll
  for (int r = 0; r < RESIDENT; ++r)
    product[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
}

// acc = acc * decay + weights [RESIDENT, 32] times the rows of `streamed`; the lane's columns are
// lane, lane + 32, and so on.
__device__ inline void accumulate(float (&acc)[RESIDENT][MAX_COLUMNS],
                                  const float (&decay)[RESIDENT], const float* weights,
                                  const float* streamed, int dim) {
#pragma unroll
  for (int i = 0; i < MAX_COLUMNS; ++i) {
    const int column = threadIdx.x % LANES + i * LANES;
    if (column >= dim) break;
    float sum[RESIDENT] = {};
    for (int s = 0; s < LANES; ++s) {
      const float y = streamed[s * pitch(dim) + column];
#pragma unroll
      for (int r = 0; r < RESIDENT; ++r) sum[r] = fmaf(weights[r * LANES + s], y, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < RESIDENT; ++r) acc[r][i] = fmaf(acc[r][i], decay[r], sum[r]);
  }
}

// One of the warp's rows, times `factor`, to `target`, null if it does not exist.
__device__ inline void store(float* target, const float (&acc)[MAX_COLUMNS], float factor,
                             int dim) {
#pragma unroll
  for (int i = 0; i < MAX_COLUMNS; ++i) {
    const int column = threadIdx.x % LANES + i * LANES;
    if (target != nullptr && column < dim) target[column] = acc[i] * factor;
  }
}

// Row r of the document's keys or values from `start` on, null past the last.
__device__ inline const float* key_row(const QueryTile& tile, const Heads& x, int key) {
  return key < tile.keys ? row_of<float>(x, tile.key + key, tile.head) : nullptr;
}

__global__ void __launch_bounds__(THREADS) attention_fp32_forward_kernel(const Attention a) {
  const QueryTile tile = QueryTile::make<ROWS, LANES>(a);
  if (tile.rows.count <= 0) return;
  const int dim = (int)a.head_dim, lane = threadIdx.x % LANES;
  const int first_row = threadIdx.x / LANES * RESIDENT;
  float* const q_tile = reinterpret_cast<float*>(shared_memory);
  float* const k_tile = q_tile + ROWS * pitch(dim);
  float* const v_tile = k_tile + LANES * pitch(dim);
  float* const weights = v_tile + LANES * pitch(dim) + first_row * LANES;

  load(q_tile, ROWS, dim, [&](int r) { return tile.rows.row<float>(a.q, r); });
  float acc[RESIDENT][MAX_COLUMNS] = {}, row_max[RESIDENT], row_sum[RESIDENT] = {};
#pragma unroll
  for (int r = 0; r < RESIDENT; ++r) row_max[r] = -INFINITY;
  for (int start = 0; start < tile.end; start += LANES) {
    __syncthreads();
    load(k_tile, LANES, dim, [&](int s) { return key_row(tile, a.k, start + s); });
    load(v_tile, LANES, dim, [&](int s) { return key_row(tile, a.v, start + s); });
    __syncthreads();
    float scores[RESIDENT], decay[RESIDENT];
    multiply(scores, q_tile + first_row * pitch(dim), k_tile, dim);
#pragma unroll
    for (int r = 0; r < RESIDENT; ++r) {
      const bool seen = start + lane <= tile.last(first_row + r);
      const float score = seen ? scores[r] * a.scale : -INFINITY;
      const float highest = fmaxf(row_max[r], largest_of_lanes(score, 1, 16));
      // A row that has seen no key yet has no maximum to subtract.
      const float shift = highest == -INFINITY ? 0.0f : highest;
      decay[r] = expf(row_max[r] - shift);
      const float p = seen ? expf(fmaf(scores[r], a.scale, -shift)) : 0.0f;
      row_sum[r] = row_sum[r] * decay[r] + sum_of_lanes(p, 1, 16);
      row_max[r] = highest;
      weights[r * LANES + lane] = p;
    }
    __syncwarp();
    accumulate(acc, decay, weights, v_tile, dim);
  }
#pragma unroll
  for (int r = 0; r < RESIDENT; ++r) {
    const int row = first_row + r;
    // A row that sees no key: 0, and minus infinity as the logarithm of an empty sum.
    const float sum = row_sum[r] == 0.0f ? 1.0f : row_sum[r];
    if (lane == 0 && row < tile.rows.count)
      a.lse[tile.rows.statistic(a.tokens, row)] = row_max[r] + logf(sum);
    store(tile.rows.dense_row<float>(a.out, a.heads, dim, row), acc[r], 1.0f / sum, dim);
  }
}

// delta [heads, tokens] = sum(dout * out) of each row, a warp to a row.
__global__ void __launch_bounds__(THREADS) attention_fp32_delta_kernel(const AttentionBackward b) {
  const Attention& a = b;
  const int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / LANES;
  const int64_t token = item / a.heads, head = item % a.heads;
  if (token >= a.tokens) return;
  const float* const dout = row_of<float>(b.dout, token, head);
  const float* const out = (const float*)a.out + item * a.head_dim;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % LANES; i < a.head_dim; i += LANES)
    sum = fmaf(dout[i], out[i], sum);
  sum = sum_of_lanes(sum, 1, 16);
  if (threadIdx.x % LANES == 0) b.delta[head * a.tokens + token] = sum;
}

__global__ void __launch_bounds__(THREADS) attention_fp32_dq_kernel(const AttentionBackward b) {
  const Attention& a = b;
  const QueryTile tile = QueryTile::make<ROWS, LANES>(a);
  const QueryRows& rows = tile.rows;
  if (rows.count <= 0) return;
  const int dim = (int)a.head_dim, lane = threadIdx.x % LANES;
  const int first_row = threadIdx.x / LANES * RESIDENT;
  float* const q_tile = reinterpret_cast<float*>(shared_memory);
  float* const dout_tile = q_tile + ROWS * pitch(dim);
  float* const k_tile = dout_tile + ROWS * pitch(dim);
  float* const v_tile = k_tile + LANES * pitch(dim);
  float* const weights = v_tile + LANES * pitch(dim) + first_row * LANES;

  load(q_tile, ROWS, dim, [&](int r) { return rows.row<float>(a.q, r); });
  load(dout_tile, ROWS, dim, [&](int r) { return rows.row<float>(b.dout, r); });
  float acc[RESIDENT][MAX_COLUMNS] = {}, lse[RESIDENT], delta[RESIDENT], keep[RESIDENT];
#pragma unroll
  for (int r = 0; r < RESIDENT; ++r) {
    const bool exists = first_row + r < rows.count;
    lse[r] = exists ? a.lse[rows.statistic(a.tokens, first_row + r)] : 0.0f;
    delta[r] = exists ? b.delta[rows.statistic(a.tokens, first_row + r)] : 0.0f;
    keep[r] = 1.0f;
  }
  for (int start = 0; start < tile.end; start += LANES) {
    __syncthreads();
    load(k_tile, LANES, dim, [&](int s) { return key_row(tile, a.k, start + s); });
    load(v_tile, LANES, dim, [&](int s) { return key_row(tile, a.v, start + s); });
    __syncthreads();
    float scores[RESIDENT], dp[RESIDENT];
    multiply(scores, q_tile + first_row * pitch(dim), k_tile, dim);
    multiply(dp, dout_tile + first_row * pitch(dim), v_tile, dim);
#pragma unroll
    for (int r = 0; r < RESIDENT; ++r) {
      const bool seen = start + lane <= tile.last(first_row + r);
      const float p = seen ? expf(fmaf(scores[r], a.scale, -lse[r])) : 0.0f;
      weights[r * LANES + lane] = p * (dp[r] - delta[r]);
    }
    __syncwarp();
    accumulate(acc, keep, weights, k_tile, dim);
  }
#pragma unroll
  for (int r = 0; r < RESIDENT; ++r)
    store(rows.dense_row<float>(b.dq, a.heads, dim, first_row + r), acc[r], a.scale, dim);
}

__global__ void __launch_bounds__(THREADS) attention_fp32_dkdv_kernel(const AttentionBackward b) {
  const Attention& a = b;
  const KeyTile tile = KeyTile::make<ROWS>(a);
  if (tile.count <= 0) return;
  const int dim = (int)a.head_dim, lane = threadIdx.x % LANES;
  const int first_key = threadIdx.x / LANES * RESIDENT;
  float* const k_tile = reinterpret_cast<float*>(shared_memory);
  float* const v_tile = k_tile + ROWS * pitch(dim);
  float* const q_tile = v_tile + ROWS * pitch(dim);
  float* const dout_tile = q_tile + LANES * pitch(dim);
  float* const p_weights = dout_tile + LANES * pitch(dim) + first_key * LANES;
  float* const ds_weights = p_weights + ROWS * LANES;

  load(k_tile, ROWS, dim, [&](int r) { return tile.row<float>(a.k, r); });
  load(v_tile, ROWS, dim, [&](int r) { return tile.row<float>(a.v, r); });
  float dk[RESIDENT][MAX_COLUMNS] = {}, dv[RESIDENT][MAX_COLUMNS] = {}, keep[RESIDENT];
#pragma unroll
  for (int r = 0; r < RESIDENT; ++r) keep[r] = 1.0f;
  for (int start = tile.begin; start < tile.rows; start += LANES) {
    const QueryRows rows = tile.rows_from(start, LANES);
    __syncthreads();
    load(q_tile, LANES, dim, [&](int s) { return rows.row<float>(a.q, s); });
    load(dout_tile, LANES, dim, [&](int s) { return rows.row<float>(b.dout, s); });
    __syncthreads();
    // A row past the end has zeros for q and dout, and so adds nothing whatever its probabilities.
    const bool exists = lane < rows.count;
    const float lse = exists ? a.lse[rows.statistic(a.tokens, lane)] : 0.0f;
    const float delta = exists ? b.delta[rows.statistic(a.tokens, lane)] : 0.0f;
    // The last key that the lane's row sees, counted from the tile's first.
    const int last = a.causal ? start / tile.group + rows.step(lane) + tile.shift - tile.first
                              : tile.count - 1;
    float scores[RESIDENT], dp[RESIDENT];
    multiply(scores, k_tile + first_key * pitch(dim), q_tile, dim);
    multiply(dp, v_tile + first_key * pitch(dim), dout_tile, dim);
#pragma unroll
    for (int r = 0; r < RESIDENT; ++r) {
      const bool seen = first_key + r <= last;
      const float p = seen ? expf(fmaf(scores[r], a.scale, -lse)) : 0.0f;
      p_weights[r * LANES + lane] = p;
      ds_weights[r * LANES + lane] = p * (dp[r] - delta);
    }
    __syncwarp();
    accumulate(dv, keep, p_weights, dout_tile, dim);
    accumulate(dk, keep, ds_weights, q_tile, dim);
  }
#pragma unroll
  for (int r = 0; r < RESIDENT; ++r) {
    store(tile.dense_row<float>(b.dk, a.kv_heads, dim, first_key + r), dk[r], a.scale, dim);
    store(tile.dense_row<float>(b.dv, a.kv_heads, dim, first_key + r), dv[r], 1.0f, dim);
  }
}

// Of tiles and, each ROWS by 32, weights.
template <int RESIDENT_TILES, int WEIGHTS>
auto shared_bytes(int64_t dim) {
  constexpr auto bytes = [](int64_t dim) {
    return ((RESIDENT_TILES * ROWS + 2 * LANES) * pitch(dim) + WEIGHTS * ROWS * LANES) *
           sizeof(float);
  };
  return SharedBytes<bytes(MAX_DIM)>{bytes(dim)};
}

int64_t query_tiles(const Attention& a) {
  return tiles_for(a.tokens * (a.heads / a.kv_heads), ROWS, a.documents) * a.kv_heads;
}

}  // namespace

void attention_fp32(const Attention& a) {
  launch<attention_fp32_forward_kernel>("attention_fp32_forward_kernel", grid_of(query_tiles(a)),
                                        dim3(THREADS), shared_bytes<1, 1>(a.head_dim),
                                        (cudaStream_t)a.stream, a);
}

void attention_backward_fp32(const AttentionBackward& b) {
  const Attention& a = b;
  const auto stream = (cudaStream_t)a.stream;
  if (a.tokens > 0) {
    launch<attention_fp32_delta_kernel>("attention_fp32_delta_kernel",
                                        grid_of((a.tokens * a.heads + WARPS - 1) / WARPS),
                                        dim3(THREADS), SharedBytes<0>{}, stream, b);
    launch<attention_fp32_dq_kernel>("attention_fp32_dq_kernel", grid_of(query_tiles(a)),
                                     dim3(THREADS), shared_bytes<2, 1>(a.head_dim), stream, b);
  }
  if (a.keys > 0)
    launch<attention_fp32_dkdv_kernel>("attention_fp32_dkdv_kernel",
                                       grid_of(tiles_for(a.keys, ROWS, a.documents) * a.kv_heads),
                                       dim3(THREADS), shared_bytes<2, 2>(a.head_dim), stream, b);
}

}  // namespace llama2rt

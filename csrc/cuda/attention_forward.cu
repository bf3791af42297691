// Attention over packed documents, forward, for tensor cores of the sm_80 family and later.
//
// A block owns a tile of query rows and walks over the keys they see. Keys and values arrive in
// turn in a ring of tiles, filled by asynchronous copies STAGES - 1 tiles ahead. The softmax is
// online, in fp32; a tile's probabilities go from one product's registers into the next's.
//
// Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691). Left out: dropout, biases, windows.
// Not yet run on a GPU.
#include <math.h>

#include "attention.cuh"

namespace llama2rt {
namespace {

struct Shape {
  int rows, keys, warps, stages, blocks;  // blocks: that should fit a multiprocessor at once
};

// By padded head dimension. 32 rows a warp where the accumulator leaves room for them, since each
// fragment of keys or values then serves two products; the ring as deep as lets `blocks` blocks
// share 164 KB (A100), and one fit 99 KB (other chips of the family). Chosen from registers and
// shared memory, not yet by time.
constexpr Shape shape(int dim) {
  if (dim <= 32) return {128, 64, 4, 4, 3};
  if (dim <= 64) return {128, 64, 4, 4, 2};
  if (dim <= 128) return {128, 64, 4, 3, 2};
  return {64, 32, 4, 3, 2};
}

template <typename T, int DIM>
__global__ void __launch_bounds__(32 * shape(DIM).warps, shape(DIM).blocks)
    attention_forward_kernel(const Attention a) {
  constexpr int ROWS = shape(DIM).rows, KEYS = shape(DIM).keys, STAGES = shape(DIM).stages;
  constexpr int THREADS = 32 * shape(DIM).warps, M = ROWS / shape(DIM).warps / 16;
  const QueryTile tile = QueryTile::make<ROWS, KEYS>(a);
  if (tile.rows.count <= 0) return;
  T* const q_tile = reinterpret_cast<T*>(shared_memory);
  T* const ring = q_tile + ROWS * DIM;
  const int dim = (int)a.head_dim, lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 * M;

  // Tiles in the order of their use: 2 j are keys from j * KEYS on, 2 j + 1 the values.
  auto issue = [&](int turn) {
    const Heads& x = turn % 2 ? a.v : a.k;
    const int start = turn / 2 * KEYS;
    if (start < tile.end)
      load_tile<KEYS, DIM, THREADS>(ring + turn % STAGES * KEYS * DIM, dim, [&](int r) {
        return start + r < tile.keys ? row_of<T>(x, tile.key + start + r, tile.head) : nullptr;
      });
    ptx::cp_async_commit();
  };
  // A tile of the ring, once it is there. The barrier also says that all warps are done with the
  // tile before it, whose slot the next copy takes.
  auto wait_for = [&](int turn) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();
    issue(turn + STAGES - 1);
    return ring + turn % STAGES * KEYS * DIM;
  };

  if (tile.end > 0)
    load_tile<ROWS, DIM, THREADS>(q_tile, dim, [&](int r) { return tile.rows.row<T>(a.q, r); });
  for (int turn = 0; turn < STAGES - 1; ++turn) issue(turn);

  float acc[M][DIM / 8][4] = {}, row_max[M][2], row_sum[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) row_max[m][half] = -INFINITY;
  const float scale = a.scale * LOG2E;
  // Keys that the warp's last row sees; a warp without rows sees none.
  const int warp_end =
      first_row >= tile.rows.count ? 0 : min(tile.end, tile.last(first_row + 16 * M - 1) + 1);

  for (int start = 0, turn = 0; start < tile.end; start += KEYS, turn += 2) {
    const bool busy = start < warp_end;
    uint32_t p[M][KEYS / 16][4];
    const T* const k_tile = wait_for(turn);
    if (busy) {
      float scores[M][KEYS / 8][4] = {};
      multiply_rows<M, KEYS, DIM>(scores, q_tile, first_row, k_tile);
      if (start + KEYS > tile.full) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int last = tile.last(first_row + m * 16 + i / 2 * 8 + lane / 4);
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
              if (start + n * 8 + lane % 4 * 2 + i % 2 > last) scores[m][n][i] = -INFINITY;
          }
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float highest = -INFINITY;
#pragma unroll
          for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i)
              highest = fmaxf(highest, scores[m][n][i]);
          highest = fmaxf(row_max[m][half], largest_of_lanes(highest, 1, 2) * scale);
          // A row that has seen no key yet has no maximum to subtract.
          const float shift = highest == -INFINITY ? 0.0f : highest;
          const float decay = ptx::exp2(row_max[m][half] - shift);
          row_max[m][half] = highest;
          float sum = 0.0f;
#pragma unroll
          for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i)
              sum += scores[m][n][i] = ptx::exp2(fmaf(scores[m][n][i], scale, -shift));
          row_sum[m][half] = row_sum[m][half] * decay + sum;
#pragma unroll
          for (int n = 0; n < DIM / 8; ++n) {
            acc[m][n][2 * half] *= decay;
            acc[m][n][2 * half + 1] *= decay;
          }
        }
      operand<T>(p, scores);
    }
    const T* const v_tile = wait_for(turn + 1);
    if (busy) multiply_columns<M, KEYS, DIM, DIM>(acc, p, v_tile);
  }

#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = row_sum[m][half];
      sum = sum_of_lanes(sum, 1, 2);
      // A row that sees no key: 0, and minus infinity as the logarithm of an empty sum.
      if (sum == 0.0f) sum = 1.0f;
      const int r = first_row + m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && r < tile.rows.count)
        a.lse[tile.rows.statistic(a.tokens, r)] = row_max[m][half] / LOG2E + logf(sum);
    }
  // No warp but this one reads its rows of the tile of queries, and it has read them.
  store_rows<M, DIM, DIM>(
      q_tile, first_row, acc, 0, dim, [&](int m, int half) { return 1.0f / row_sum[m][half]; },
      [&](int r) { return tile.rows.dense_row<T>(a.out, a.heads, dim, r); });
}

template <typename T, int DIM>
void run(const Attention& a) {
  constexpr Shape s = shape(DIM);
  const int64_t tiles = tiles_for(a.tokens * (a.heads / a.kv_heads), s.rows, a.documents);
  constexpr size_t BYTES = (s.rows + s.stages * s.keys) * DIM * sizeof(T);
  launch<attention_forward_kernel<T, DIM>>("attention_forward_kernel", grid_of(tiles * a.kv_heads),
                                           dim3(32 * s.warps), SharedBytes<BYTES>{},
                                           (cudaStream_t)a.stream, a);
}

}  // namespace

void attention(const Attention& a) {
  DeviceGuard guard(a.device);
  if (a.dtype == DType::fp32) return attention_fp32(a);
  by_shape(a, [&](auto t, auto dim) { run<decltype(t), dim()>(a); });
}

}  // namespace llama2rt

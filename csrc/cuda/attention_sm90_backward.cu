// Attention backward for Hopper, without atomics: one kernel owns rows of dq, one owns keys of dk
// and dv, so that the bits repeat. Blocks, tiles and instructions are those of the forward pass.
//
//   p = 2^(score * scale * log2(e) - lse * log2(e));  ds = p * (dp - delta),  dp = dout . values
//   dq = scale * ds . keys;  dv = p^T . dout;  dk = scale * ds^T . queries;  delta = dout . out
//
// The kernel of dq also computes delta, which the other one reads. That one forms scores and dp
// transposed, rows of keys, so that p^T and ds^T leave the registers as left factors. Documents'
// ends are as in the forward pass: scores are masked by selection, and what a product sums over is
// zero where the next document begins.
//
// Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), its loops divided between two kernels.
// Left out: products of one tile under the arithmetic of another inside a warp group (the two warp
// groups do overlap), and dq in the same pass, which takes atomics or an order among blocks.
//
// Not yet run on a GPU.
#include "attention_sm90.cuh"
#include "vec.cuh"

namespace llama2rt::sm90 {

// Rows of queries or keys in a tile of the inner loop: more would not leave registers for the sums.
inline constexpr int INNER = 64, STAGES = 4;

// The tiles of the outer loop stay; those of the inner come through a ring, two at a time.
template <int DIM>
struct BackwardShared {
  Tile<DIM, ROWS> first, second;               // q and dout, or k and v
  Tile<DIM, INNER> inner[STAGES][2];           // k and v, or q and dout
  Ring<STAGES> ring;
  uint64_t outer_full;
};

struct Pair {
  const TensorMap &one, &two;
};

template <int DIM>
__device__ void load_outer(BackwardShared<DIM>& s, const Pair& maps, int head, int64_t token) {
  mbarrier_arrive_expect(&s.outer_full, 2 * sizeof(s.first));
  load_tile(s.first, maps.one, &s.outer_full, head, token);
  load_tile(s.second, maps.two, &s.outer_full, head, token);
}

template <int DIM>
__device__ void load_inner(BackwardShared<DIM>& s, int i, const Pair& maps, int head,
                           int64_t token) {
  uint64_t* barrier = &s.ring.full[i % STAGES];
  mbarrier_wait(&s.ring.free[i % STAGES], s.ring.parity(i) ^ 1);
  mbarrier_arrive_expect(barrier, sizeof(s.inner[0]));
  load_tile(s.inner[i % STAGES][0], maps.one, barrier, head, token);
  load_tile(s.inner[i % STAGES][1], maps.two, barrier, head, token);
}

// ---- dq ----

using DqWork = QueryWork<INNER>;

template <int DIM>
__device__ void produce_dq(BackwardShared<DIM>& s, const Pair& rows, const Pair& keys,
                           const DqWork& w) {
  load_outer(s, rows, w.head, w.query_start + w.first);
#pragma unroll 1
  for (int i = 0; i < w.tiles; ++i)
    load_inner(s, i, keys, w.kv_head, w.key_start + (int64_t)i * INNER);
}

// dout . out of one query, by the four threads that hold its row.
template <typename T, int DIM>
__device__ float delta_of(const AttentionBackward& b, int64_t token, int head) {
  const T* dout = row_of<T>(b.dout, token, head);
  const T* out = static_cast<const T*>(b.out) + (token * b.heads + head) * DIM;
  float sum = 0.0f;
#pragma unroll
  for (int column = threadIdx.x % 4 * 8; column < DIM; column += 32) {
    const auto x = Pack<T, 8>::load(dout + column), y = Pack<T, 8>::load(out + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  }
  return sum;
}

template <typename T, int DIM>
__device__ void consume_dq(BackwardShared<DIM>& s, const AttentionBackward& b, const DqWork& w,
                           int group) {
  const Attention& a = b;
  const int group_row = GROUP_ROWS * group, row = w.first + group_row + first_row();
  const float scale2 = a.scale * LOG2E;
  float lse2[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = row + 8 * r < w.queries;
    const int64_t token = w.query_start + row + 8 * r, at = w.head * a.tokens + token;
    lse2[r] = exists ? a.lse[at] * LOG2E : 0.0f;
    delta[r] = sum_of_lanes(exists ? delta_of<T, DIM>(b, token, w.head) : 0.0f, 1, 2);
    if (exists && threadIdx.x % 4 == 0) b.delta[at] = delta[r];
  }

  float dq[DIM / 2] = {}, scores[INNER / 2], dp[INNER / 2];
  uint32_t factor[INNER / 16][4];
  if (w.tiles > 0) mbarrier_wait(&s.outer_full, 0);
  for (int i = 0; i < w.tiles; ++i) {
    auto& keys = s.inner[i % STAGES][0];
    const int key = i * INNER;
    mbarrier_wait(&s.ring.full[i % STAGES], s.ring.parity(i));
    if (w.keys - key < INNER) {
      clear_rows(keys, w.keys - key);
      show_cleared();
    }
    wgmma_fence();
    multiply_rows<T>(scores, s.first, group_row, keys);
    multiply_rows<T>(dp, s.second, group_row, s.inner[i % STAGES][1]);
    wgmma_commit();
    wgmma_wait<0>();
    warpgroup_fence(scores), warpgroup_fence(dp);
    const bool masked = w.masked(a, w.first + group_row, key);
    const int last[2] = {w.last(a, row, key), w.last(a, row + 8, key)};
#pragma unroll
    for (int j = 0; j < INNER / 2; ++j) {
      const int r = row_half(j);
      const float p = ptx::exp2(fmaf(scores[j], scale2, -lse2[r]));
      const bool hidden = masked && first_column() + column_of(j) > last[r];
      scores[j] = hidden ? 0.0f : p * (dp[j] - delta[r]);
    }
    to_factor<T>(scores, factor);
    warpgroup_fence(dq), warpgroup_fence(factor);
    wgmma_fence();
    multiply_columns<T>(dq, factor, keys);
    wgmma_commit();
    wgmma_wait<0>();
    warpgroup_fence(dq);
    if (elect_one()) mbarrier_arrive(&s.ring.free[i % STAGES]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (row + 8 * r < w.queries)
      store_row<T>(b.dq, (w.query_start + row + 8 * r) * a.heads + w.head, dq, r, a.scale);
}

// ---- dk and dv ----

// 128 keys of one key head, and the queries of their document and of all heads of the group that
// see any of them: those from `begin` on.
struct KeyWork {
  int64_t query_start, key_start;
  int queries, keys, first, head, group, shift, begin;
  int tiles, uses;  // of queries: for one head, and for all of the group

  __device__ explicit KeyWork(const Attention& a) : group((int)(a.heads / a.kv_heads)) {
    const int64_t tiles_of_keys = tiles_for(a.keys, ROWS, a.documents);
    // The first keys of a document are seen by most queries: the long tiles lie at the front.
    const TileAndHead at = schedule(tiles_of_keys, a.kv_heads, a.q_section);
    const Extent extent = locate<ROWS>(k_offsets(a), a.documents, 1, at.tile);
    query_start = q_offsets(a)[extent.document];
    key_start = k_offsets(a)[extent.document];
    queries = (int)(q_offsets(a)[extent.document + 1] - query_start);
    keys = (int)(k_offsets(a)[extent.document + 1] - key_start);
    first = extent.first;
    head = (int)at.head;
    shift = keys - queries;
    begin = a.causal ? min(max(first - shift, 0), queries) : 0;
    tiles = (queries - begin + INNER - 1) / INNER;
    uses = tiles * group;
  }
  __device__ int query_head(int use) const { return head * group + use / tiles; }
  __device__ int query(int use) const { return begin + use % tiles * INNER; }
};

template <int DIM>
__device__ void produce_dkdv(BackwardShared<DIM>& s, const Pair& keys, const Pair& rows,
                             const KeyWork& w) {
  load_outer(s, keys, w.head, w.key_start + w.first);
#pragma unroll 1
  for (int i = 0; i < w.uses; ++i)
    load_inner(s, i, rows, w.query_head(i), w.query_start + w.query(i));
}

template <typename T, int DIM>
__device__ void consume_dkdv(BackwardShared<DIM>& s, const AttentionBackward& b, const KeyWork& w,
                             int group) {
  const Attention& a = b;
  const int group_row = GROUP_ROWS * group, key = w.first + group_row + first_row();
  const float scale2 = a.scale * LOG2E;
  float dk[DIM / 2] = {}, dv[DIM / 2] = {}, scores[INNER / 2], dp[INNER / 2];
  uint32_t weights[INNER / 16][4], dscores[INNER / 16][4];
  if (w.uses > 0) mbarrier_wait(&s.outer_full, 0);
  for (int i = 0; i < w.uses; ++i) {
    auto &rows = s.inner[i % STAGES][0], &dout = s.inner[i % STAGES][1];
    const int query = w.query(i), present = w.queries - query;
    mbarrier_wait(&s.ring.full[i % STAGES], s.ring.parity(i));
    if (present < INNER) {
      clear_rows(rows, present);
      clear_rows(dout, present);
      show_cleared();
    }
    wgmma_fence();
    multiply_rows<T>(scores, s.first, group_row, rows);
    multiply_rows<T>(dp, s.second, group_row, dout);
    wgmma_commit();
    wgmma_wait<0>();
    warpgroup_fence(scores), warpgroup_fence(dp);
    const int64_t at = w.query_head(i) * a.tokens + w.query_start + query;
    // Past the document's end queries and dout are zeros: p is 1 and ds 0, and both meet zeros.
    // Two loops, since registers for lse and delta at once are not left.
#pragma unroll
    for (int j = 0; j < INNER / 2; ++j) {
      const int column = first_column() + column_of(j);
      const float lse2 = column < present ? a.lse[at + column] * LOG2E : 0.0f;
      const bool hidden = a.causal && key + 8 * row_half(j) > query + column + w.shift;
      scores[j] = hidden ? 0.0f : ptx::exp2(fmaf(scores[j], scale2, -lse2));
    }
    warpgroup_fence(scores);
#pragma unroll
    for (int j = 0; j < INNER / 2; ++j) {
      const int column = first_column() + column_of(j);
      dp[j] = scores[j] * (dp[j] - (column < present ? b.delta[at + column] : 0.0f));
    }
    to_factor<T>(scores, weights);
    to_factor<T>(dp, dscores);
    warpgroup_fence(dk), warpgroup_fence(dv), warpgroup_fence(weights), warpgroup_fence(dscores);
    wgmma_fence();
    multiply_columns<T>(dv, weights, dout);
    multiply_columns<T>(dk, dscores, rows);
    wgmma_commit();
    wgmma_wait<0>();
    warpgroup_fence(dk), warpgroup_fence(dv);
    if (elect_one()) mbarrier_arrive(&s.ring.free[i % STAGES]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (key + 8 * r < w.keys) {
      const int64_t target = (w.key_start + key + 8 * r) * a.kv_heads + w.head;
      store_row<T>(b.dk, target, dk, r, a.scale);
      store_row<T>(b.dv, target, dv, r, 1.0f);
    }
}

// ---- Kernels ----

template <int DIM>
__device__ BackwardShared<DIM>& prepare() {
  auto& s = *reinterpret_cast<BackwardShared<DIM>*>(shared_memory);
  if (threadIdx.x == 0) {
    mbarrier_init(&s.outer_full, 1);
    s.ring.init();
    fence_mbarrier_init();
  }
  __syncthreads();
  return s;
}

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 1)
    attention_dq_sm90_kernel(const __grid_constant__ TensorMap q,
                             const __grid_constant__ TensorMap dout,
                             const __grid_constant__ TensorMap k,
                             const __grid_constant__ TensorMap v, AttentionBackward b) {
  if constexpr (IS_SM90A) {
    const DqWork w(b);
    if (w.first >= w.queries) return;
    BackwardShared<DIM>& s = prepare<DIM>();
    if (threadIdx.x < GROUP_THREADS) {
      setmaxnreg_dec<PRODUCER_REGISTERS>();
      if (threadIdx.x == 0 && w.tiles > 0) produce_dq(s, {q, dout}, {k, v}, w);
    } else {
      setmaxnreg_inc<CONSUMER_REGISTERS>();
      consume_dq<T>(s, b, w, threadIdx.x / GROUP_THREADS - 1);
    }
  } else {
    trap();
  }
}

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 1)
    attention_dkdv_sm90_kernel(const __grid_constant__ TensorMap k,
                               const __grid_constant__ TensorMap v,
                               const __grid_constant__ TensorMap q,
                               const __grid_constant__ TensorMap dout, AttentionBackward b) {
  if constexpr (IS_SM90A) {
    const KeyWork w(b);
    if (w.first >= w.keys) return;
    BackwardShared<DIM>& s = prepare<DIM>();
    if (threadIdx.x < GROUP_THREADS) {
      setmaxnreg_dec<PRODUCER_REGISTERS>();
      if (threadIdx.x == 0 && w.uses > 0) produce_dkdv(s, {k, v}, {q, dout}, w);
    } else {
      setmaxnreg_inc<CONSUMER_REGISTERS>();
      consume_dkdv<T>(s, b, w, threadIdx.x / GROUP_THREADS - 1);
    }
  } else {
    trap();
  }
}

template <typename T, int DIM>
void backward(const AttentionBackward& b) {
  const Attention& a = b;
  auto rows = [&](const Heads& x, int length) {
    return heads_map<T, DIM>(x, a.tokens, a.heads, length);
  };
  auto keys = [&](const Heads& x, int length) {
    return heads_map<T, DIM>(x, a.keys, a.kv_heads, length);
  };
  const auto stream = (cudaStream_t)a.stream;
  const int64_t row_blocks = tiles_for(a.tokens, ROWS, a.documents) * a.heads;
  const int64_t key_blocks = tiles_for(a.keys, ROWS, a.documents) * a.kv_heads;
  const SharedBytes<sizeof(BackwardShared<DIM>)> shared;
  launch<attention_dq_sm90_kernel<T, DIM>>(
      "attention_sm90_backward, dq", dim3((unsigned)row_blocks), dim3(THREADS), shared, stream,
      rows(a.q, ROWS), rows(b.dout, ROWS), keys(a.k, INNER), keys(a.v, INNER), b);
  launch<attention_dkdv_sm90_kernel<T, DIM>>(
      "attention_sm90_backward, dk and dv", dim3((unsigned)key_blocks), dim3(THREADS), shared,
      stream, keys(a.k, ROWS), keys(a.v, ROWS), rows(a.q, INNER), rows(b.dout, INNER), b);
}

}  // namespace llama2rt::sm90

namespace llama2rt {

void attention_sm90_backward(const AttentionBackward& b) {
  DeviceGuard guard(b.device);
  const bool wide = b.head_dim == 128, half = b.dtype == DType::fp16;
  if (half)
    wide ? sm90::backward<f16, 128>(b) : sm90::backward<f16, 64>(b);
  else
    wide ? sm90::backward<bf16, 128>(b) : sm90::backward<bf16, 64>(b);
}

}  // namespace llama2rt

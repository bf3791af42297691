// Attention forward for Hopper: products by wgmma, tiles brought by TMA, one warp group that copies
// and two that compute. Packed documents, grouped queries, head dims 64 and 128, bf16 and fp16.
//
// A block has 128 queries of one head and walks over the document's keys, 128 at a time, from the
// last that its rows see to the first. One thread of the first warp group keeps rings of key and
// value tiles filled. Each of the other two warp groups owns 64 rows. Inside a warp group the
// scores of one tile are multiplied while the values of the tile before are; between them the two
// take turns at issuing products, so that one's softmax runs under the other's products.
//
// The tiles of a document's end also hold the next document's rows. Their scores are masked by
// selection, and their values are overwritten with zeros, so that nothing of them, not even a NaN,
// comes through; queries past the end are computed and not stored.
//
// Algorithm: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, sections 3.1 and 3.2). Left out:
// a persistent grid, packing the heads of a group into one tile, stores by TMA, fp8.
//
// Not yet run on a GPU.
#include "attention_sm90.cuh"
#include "vec.cuh"

namespace llama2rt::sm90 {

inline constexpr int KEYS = 128;
using Work = QueryWork<KEYS>;

template <int DIM>
struct Shared {
  static constexpr int STAGES = 256 / DIM;
  Tile<DIM, ROWS> q;
  Tile<DIM, KEYS> k[STAGES], v[STAGES];
  Ring<STAGES> keys, values;
  uint64_t q_full;
};

// ---- The copying thread ----

template <int DIM>
__device__ void produce(Shared<DIM>& s, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                        const Work& w) {
  mbarrier_arrive_expect(&s.q_full, sizeof(s.q));
  load_tile(s.q, q, &s.q_full, w.head, w.query_start + w.first);
#pragma unroll 1
  for (int i = 0; i < w.tiles; ++i) {
    const int stage = i % s.STAGES;
    const int64_t token = w.key_start + (int64_t)(w.tiles - 1 - i) * KEYS;
    mbarrier_wait(&s.keys.free[stage], s.keys.parity(i) ^ 1);
    mbarrier_arrive_expect(&s.keys.full[stage], sizeof(s.k[0]));
    load_tile(s.k[stage], k, &s.keys.full[stage], w.kv_head, token);
    mbarrier_wait(&s.values.free[stage], s.values.parity(i) ^ 1);
    mbarrier_arrive_expect(&s.values.full[stage], sizeof(s.v[0]));
    load_tile(s.v[stage], v, &s.values.full[stage], w.kv_head, token);
  }
}

// ---- A computing warp group ----

// Two rows of a thread: the maximum of their scaled scores so far and the sum of its weights, which
// is summed over the four threads of a row at the end only.
struct Softmax {
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
};

// Scores become weights 2^(score * scale2 - row_max); decay[r] is what earlier sums of row r shrink
// by.
__device__ inline void weigh(float (&scores)[KEYS / 2], Softmax& softmax, float (&decay)[2],
                             float scale2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float highest = -INFINITY;
#pragma unroll
    for (int i = 2 * r; i < KEYS / 2; i += 4)
      highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
    const float highest_yet = fmaxf(softmax.row_max[r], largest_of_lanes(highest, 1, 2) * scale2);
    // A row that has seen no key yet has no maximum to subtract.
    const float subtract = highest_yet == -INFINITY ? 0.0f : highest_yet;
    decay[r] = ptx::exp2(softmax.row_max[r] - subtract);
    softmax.row_max[r] = highest_yet;
    softmax.row_sum[r] *= decay[r];
#pragma unroll
    for (int i = 2 * r; i < KEYS / 2; i += 4)
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        scores[j] = ptx::exp2(fmaf(scores[j], scale2, -subtract));
        softmax.row_sum[r] += scores[j];
      }
  }
}

// Keys after last[r], counted from the tile's first, are hidden from row r.
__device__ inline void mask(float (&scores)[KEYS / 2], const int (&last)[2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i)
    if (first_column() + column_of(i) > last[row_half(i)]) scores[i] = -INFINITY;
}

template <typename T, int DIM>
__device__ void store(const Attention& a, const Work& w, const float (&sums)[DIM / 2],
                      const Softmax& softmax, int row) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float row_sum = sum_of_lanes(softmax.row_sum[r], 1, 2);
    if (row + 8 * r >= w.queries) continue;
    // A row that sees no key: 0, and minus infinity as the logarithm of an empty sum.
    const int64_t token = w.query_start + row + 8 * r;
    if (threadIdx.x % 4 == 0)
      a.lse[w.head * a.tokens + token] =
          row_sum == 0.0f ? -INFINITY : (softmax.row_max[r] + log2f(row_sum)) / LOG2E;
    store_row<T>(a.out, token * a.heads + w.head, sums, r, row_sum == 0.0f ? 1.0f : 1.0f / row_sum);
  }
}

template <typename T, int DIM>
__device__ void consume(Shared<DIM>& s, const Attention& a, const Work& w, int group) {
  const int group_row = GROUP_ROWS * group, row = w.first + group_row + first_row();
  float sums[DIM / 2] = {}, scores[KEYS / 2], decay[2];
  uint32_t factor[KEYS / 16][4];
  Softmax softmax;

  // From the scores of tile i, counted as they come, to weights.
  auto finish_scores = [&](int i) {
    const int key = (w.tiles - 1 - i) * KEYS;
    if (w.masked(a, w.first + group_row, key))
      mask(scores, {w.last(a, row, key), w.last(a, row + 8, key)});
    weigh(scores, softmax, decay, a.scale * LOG2E);
  };
  auto wait_keys = [&](int i) {
    if (i < w.tiles) mbarrier_wait(&s.keys.full[i % s.STAGES], s.keys.parity(i));
  };
  auto wait_values = [&](int i) {
    mbarrier_wait(&s.values.full[i % s.STAGES], s.values.parity(i));
    const int present = w.keys - (w.tiles - 1) * KEYS;
    if (i == 0 && present < KEYS) {
      clear_rows(s.v[0], present);
      show_cleared();
    }
  };

  if (w.tiles > 0) {
    mbarrier_wait(&s.q_full, 0);
    wait_keys(0);
    wgmma_fence();
    multiply_rows<T>(scores, s.q, group_row, s.k[0]);
    wgmma_commit();
    wgmma_wait<0>();
    warpgroup_fence(scores);
    if (elect_one()) mbarrier_arrive(&s.keys.free[0]);
    finish_scores(0);
    to_factor<T>(scores, factor);
    wait_keys(1);

    if (group == 1 && w.tiles > 1) barrier_arrive(TURN + 0, CONSUMER_THREADS);
    for (int i = 1; i < w.tiles; ++i) {
      wait_values(i - 1);
      barrier_sync(TURN + group, CONSUMER_THREADS);
      warpgroup_fence(scores), warpgroup_fence(sums), warpgroup_fence(factor);
      wgmma_fence();
      multiply_rows<T>(scores, s.q, group_row, s.k[i % s.STAGES]);
      wgmma_commit();
      multiply_columns<T>(sums, factor, s.v[(i - 1) % s.STAGES]);
      wgmma_commit();
      // Nobody waits for a turn after the second warp group's last.
      if (group == 0 || i + 1 < w.tiles) barrier_arrive(TURN + 1 - group, CONSUMER_THREADS);
      wgmma_wait<1>();
      warpgroup_fence(scores);
      if (elect_one()) mbarrier_arrive(&s.keys.free[i % s.STAGES]);
      finish_scores(i);
      warpgroup_fence(scores);
      // Here and not where the keys are needed: without a branch between the softmax and the next
      // line, ptxas 13.0 put that line first, and the softmax ran under no product.
      wait_keys(i + 1);
      wgmma_wait<0>();
      warpgroup_fence(sums), warpgroup_fence(factor);
      if (elect_one()) mbarrier_arrive(&s.values.free[(i - 1) % s.STAGES]);
#pragma unroll
      for (int j = 0; j < DIM / 2; ++j) sums[j] *= decay[row_half(j)];
      to_factor<T>(scores, factor);
    }

    wait_values(w.tiles - 1);
    warpgroup_fence(sums), warpgroup_fence(factor);
    wgmma_fence();
    multiply_columns<T>(sums, factor, s.v[(w.tiles - 1) % s.STAGES]);
    wgmma_commit();
    wgmma_wait<0>();
    warpgroup_fence(sums);
  }
  store<T, DIM>(a, w, sums, softmax, row);
}

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 1)
    attention_forward_sm90_kernel(const __grid_constant__ TensorMap q,
                                  const __grid_constant__ TensorMap k,
                                  const __grid_constant__ TensorMap v, Attention a) {
  if constexpr (IS_SM90A) {
    const Work w(a);
    if (w.first >= w.queries) return;
    Shared<DIM>& s = *reinterpret_cast<Shared<DIM>*>(shared_memory);
    if (threadIdx.x == 0) {
      mbarrier_init(&s.q_full, 1);
      s.keys.init();
      s.values.init();
      fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < GROUP_THREADS) {
      setmaxnreg_dec<PRODUCER_REGISTERS>();
      if (threadIdx.x == 0 && w.tiles > 0) produce(s, q, k, v, w);
    } else {
      setmaxnreg_inc<CONSUMER_REGISTERS>();
      consume<T>(s, a, w, threadIdx.x / GROUP_THREADS - 1);
    }
  } else {
    trap();  // the caller asks for a build for 90a and a Hopper GPU
  }
}

template <typename T, int DIM>
void forward(const Attention& a) {
  const int64_t blocks = tiles_for(a.tokens, ROWS, a.documents) * a.heads;
  launch<attention_forward_sm90_kernel<T, DIM>>(
      "attention_sm90", dim3((unsigned)blocks), dim3(THREADS), SharedBytes<sizeof(Shared<DIM>)>{},
      (cudaStream_t)a.stream, heads_map<T, DIM>(a.q, a.tokens, a.heads, ROWS),
      heads_map<T, DIM>(a.k, a.keys, a.kv_heads, KEYS),
      heads_map<T, DIM>(a.v, a.keys, a.kv_heads, KEYS), a);
}

}  // namespace llama2rt::sm90

namespace llama2rt {

void attention_sm90(const Attention& a) {
  DeviceGuard guard(a.device);
  const bool wide = a.head_dim == 128, half = a.dtype == DType::fp16;
  if (half)
    wide ? sm90::forward<f16, 128>(a) : sm90::forward<f16, 64>(a);
  else
    wide ? sm90::forward<bf16, 128>(a) : sm90::forward<bf16, 64>(a);
}

}  // namespace llama2rt

// Attention forward for Hopper: products by wgmma, tiles brought by TMA, one warp group that copies
// and two that compute. Packed documents, grouped queries, head dims 64 and 128, bf16 and fp16.
//
// A block has 128 queries of one head and walks over the document's keys, 128 at a time, from the
// last that its rows see to the first. One thread of the first warp group keeps a ring of key and
// value tiles filled. Each of the other two warp groups owns 64 rows. Inside a warp group the scores
// of one tile are multiplied while the values of the tile before are; between them the two take
// turns at issuing products, so that one's softmax runs under the other's products.
//
// The tiles of a document's end also hold the next document's rows. Their scores are masked by
// selection, and their values are overwritten with zeros, so that nothing of them, not even a NaN,
// comes through; queries past the end are computed and not stored.
//
// Algorithm: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, sections 3.1 and 3.2). Left out:
// a persistent grid, packing the heads of a group into one tile, stores by TMA, fp8, backward (the
// log-sum-exp is what every backward pass of this library takes).
//
// Not yet run on a GPU.
#include <launch.cuh>
#include <ptx.cuh>
#include <ptx_sm90.cuh>

#include "attention.cuh"
#include "ops.h"
#include "vec.cuh"

// Named and inline, unlike elsewhere: in the passes for other architectures the kernel's body is left
// out, and nvcc would report everything of an anonymous namespace as unused.
namespace llama2rt::sm90 {

using namespace ptx;

inline constexpr int ROWS = 128, KEYS = 128, GROUP_THREADS = 128, GROUP_ROWS = 64;
inline constexpr int THREADS = 3 * GROUP_THREADS, CONSUMER_WARPS = 8;
// 65536 registers are 168 for each of 384 threads; the copying warp group hands most of its own to
// the others. The counts are those of arXiv:2407.08608's code for this shape of block.
inline constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
// Barrier 0 is __syncthreads().
inline constexpr int TURN = 1, TAIL = 3;

// Tiles are chunks of 64 columns = 128 bytes a row, as the swizzle wants them.
template <int DIM>
struct Shared {
  static constexpr int CHUNKS = DIM / 64, STAGES = 256 / DIM;
  unsigned char q[CHUNKS][ROWS][128];
  unsigned char k[STAGES][CHUNKS][KEYS][128];
  unsigned char v[STAGES][CHUNKS][KEYS][128];
  uint64_t q_full, k_full[STAGES], k_free[STAGES], v_full[STAGES], v_free[STAGES];
};

// What one block computes. Tiles of query rows are shared out as in attention.cuh, a query head at a
// time: `section` key heads, whose keys and values then stay in the cache, before the next ones.
struct Work {
  int64_t query_start, key_start;  // tokens
  int queries, keys;               // of the document
  int first;                       // query of the tile's first row
  int head, kv_head;
  int shift;  // query i sees keys up to i + shift, if causal
  int tiles;  // of keys that some row sees

  __device__ explicit Work(const Attention& a) {
    const int group = (int)(a.heads / a.kv_heads);
    const int64_t tiles_of_rows = tiles_for(a.tokens, ROWS, a.documents);
    const Place place = schedule(tiles_of_rows, a.heads, a.k_section * group);
    // The last tiles of a document see most keys: they start first, and short ones fill the end.
    const Extent extent =
        locate<ROWS>(q_offsets(a), a.documents, 1, tiles_of_rows - 1 - place.tile);
    query_start = q_offsets(a)[extent.document];
    key_start = k_offsets(a)[extent.document];
    queries = (int)(q_offsets(a)[extent.document + 1] - query_start);
    keys = (int)(k_offsets(a)[extent.document + 1] - key_start);
    first = extent.first;
    head = (int)place.head;
    kv_head = head / group;
    shift = keys - queries;
    const int seen = a.causal ? max(min(first + ROWS, queries) + shift, 0) : keys;
    tiles = (seen + KEYS - 1) / KEYS;
  }
};

// ---- The copying thread ----

template <int DIM>
__device__ void load_tile(unsigned char (&to)[DIM / 64][KEYS][128], const TensorMap& map,
                          uint64_t* barrier, int head, int64_t token) {
  mbarrier_arrive_expect(barrier, sizeof(to));
#pragma unroll
  for (int chunk = 0; chunk < DIM / 64; ++chunk)
    load_box(to[chunk], map, barrier, 64 * chunk, head, (int)token);
}

template <int DIM>
__device__ void produce(Shared<DIM>& s, const TensorMap& q, const TensorMap& k, const TensorMap& v,
                        const Work& w) {
  static_assert(ROWS == KEYS, "load_tile serves queries, keys and values");
  load_tile<DIM>(s.q, q, &s.q_full, w.head, w.query_start + w.first);
#pragma unroll 1
  for (int i = 0; i < w.tiles; ++i) {
    const int stage = i % s.STAGES, parity = i / s.STAGES % 2;
    const int64_t token = w.key_start + (int64_t)(w.tiles - 1 - i) * KEYS;
    // Of the first round every stage is free: parity 1 has "ended" before parity 0 began.
    mbarrier_wait(&s.k_free[stage], parity ^ 1);
    load_tile<DIM>(s.k[stage], k, &s.k_full[stage], w.kv_head, token);
    mbarrier_wait(&s.v_free[stage], parity ^ 1);
    load_tile<DIM>(s.v[stage], v, &s.v_full[stage], w.kv_head, token);
  }
}

// ---- A computing warp group ----

// Two rows of a thread: the maximum of their scaled scores so far and the sum of its weights, which
// is summed over the four threads of a row at the end only.
struct Softmax {
  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
};

// Scores become weights 2^(score * scale2 - peak); decay[r] is what earlier sums of row r shrink by.
__device__ inline void weigh(float (&scores)[KEYS / 2], Softmax& softmax, float (&decay)[2],
                             float scale2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float highest = -INFINITY;
#pragma unroll
    for (int i = 2 * r; i < KEYS / 2; i += 4)
      highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
    const float peak = fmaxf(softmax.peak[r], highest * scale2);
    // A row that has seen no key yet has no maximum to subtract.
    const float subtract = peak == -INFINITY ? 0.0f : peak;
    decay[r] = ptx::exp2(softmax.peak[r] - subtract);
    softmax.peak[r] = peak;
    softmax.total[r] *= decay[r];
#pragma unroll
    for (int i = 2 * r; i < KEYS / 2; i += 4)
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        scores[j] = ptx::exp2(fmaf(scores[j], scale2, -subtract));
        softmax.total[r] += scores[j];
      }
  }
}

// Keys after last[r], counted from the tile's first, are hidden from row r.
__device__ inline void mask(float (&scores)[KEYS / 2], const int (&last)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i)
    if (8 * (i / 4) + column + i % 2 > last[i / 2 % 2]) scores[i] = -INFINITY;
}

// The weights as the left factor of the next product: what a thread holds of the sums is what it
// must hold of the factor, eight sums to a step of 16 keys.
template <typename T>
__device__ void to_factor(const float (&weights)[KEYS / 2], uint32_t (&factor)[KEYS / 16][4]) {
#pragma unroll
  for (int i = 0; i < KEYS / 2; i += 2)
    factor[i / 8][i % 8 / 2] = pack<T>(weights[i], weights[i + 1]);
}

// scores = queries . keys, for the warp group's 64 rows from `row` on.
template <typename T, int DIM>
__device__ void multiply_keys(float (&scores)[KEYS / 2], const Shared<DIM>& s, int row, int stage) {
#pragma unroll
  for (int step = 0; step < DIM / 16; ++step) {
    const int chunk = step / 4, byte = step % 4 * 32;
    wgmma_shared(T{}, scores, matrix_descriptor(&s.q[chunk][row][byte], 0, 1024),
                 matrix_descriptor(&s.k[stage][chunk][0][byte], 0, 1024), step > 0);
  }
}

// sums += weights . values
template <typename T, int DIM>
__device__ void multiply_values(float (&sums)[DIM / 2], const uint32_t (&factor)[KEYS / 16][4],
                                const Shared<DIM>& s, int stage) {
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step)
    wgmma_registers(T{}, sums, factor[step],
                    matrix_descriptor(s.v[stage][0][16 * step], sizeof(s.v[0][0]), 1024));
}

// Zeros over the values from `row` on. Both warp groups write them all, and each waits only for its
// own threads: it does not matter that the other may already read, or still write, the same zeros.
template <int DIM>
__device__ void clear_tail(Shared<DIM>& s, int stage, int row, int group) {
  for (int chunk = 0; chunk < s.CHUNKS; ++chunk)
    for (int i = row * 8 + threadIdx.x % GROUP_THREADS; i < KEYS * 8; i += GROUP_THREADS)
      store_zeros(&s.v[stage][chunk][0][0] + 16 * i);
  fence_proxy_async();
  barrier_sync(TAIL + group, GROUP_THREADS);
}

// A warp has read a tile: its lanes have come through wgmma_wait together. The stage is free when all
// warps of both groups have.
__device__ inline void release(uint64_t* barrier) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

template <typename T, int DIM>
__device__ void store(const Attention& a, const Work& w, const float (&sums)[DIM / 2],
                      const Softmax& softmax, int row) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = softmax.total[r];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    if (row + 8 * r >= w.queries) continue;
    // A row that sees no key: 0, and minus infinity as the logarithm of an empty sum.
    const float inverse = total == 0.0f ? 1.0f : 1.0f / total;
    const int64_t token = w.query_start + row + 8 * r;
    if (threadIdx.x % 4 == 0)
      a.lse[w.head * a.tokens + token] =
          total == 0.0f ? -INFINITY : (softmax.peak[r] + log2f(total)) * 0.6931471805599453f;
    T* to = (T*)a.out + (token * a.heads + w.head) * DIM + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 2 * r; i < DIM / 2; i += 4)
      *reinterpret_cast<uint32_t*>(to + 2 * i - 4 * r) =
          pack<T>(sums[i] * inverse, sums[i + 1] * inverse);
  }
}

template <typename T, int DIM>
__device__ void consume(Shared<DIM>& s, const Attention& a, const Work& w, int group) {
  const int row = w.first + GROUP_ROWS * group + threadIdx.x % GROUP_THREADS / 32 * 16 +
                  threadIdx.x % 32 / 4;
  float sums[DIM / 2] = {}, scores[KEYS / 2], decay[2];
  uint32_t factor[KEYS / 16][4];
  Softmax softmax;
  const float scale2 = a.scale * LOG2E;

  // From the scores of tile i, counted as they come, to weights.
  auto finish_scores = [&](int i) {
    const int key = (w.tiles - 1 - i) * KEYS;
    const int first_hidden =
        a.causal ? min(w.first + GROUP_ROWS * group + w.shift + 1, w.keys) : w.keys;
    if (key + KEYS > first_hidden) {
      const int last[2] = {a.causal ? min(row + w.shift, w.keys - 1) - key : w.keys - 1 - key,
                           a.causal ? min(row + 8 + w.shift, w.keys - 1) - key : w.keys - 1 - key};
      mask(scores, last);
    }
    weigh(scores, softmax, decay, scale2);
  };
  auto wait_keys = [&](int i) {
    if (i < w.tiles) mbarrier_wait(&s.k_full[i % s.STAGES], i / s.STAGES % 2);
  };
  auto wait_values = [&](int i) {
    const int stage = i % s.STAGES;
    mbarrier_wait(&s.v_full[stage], i / s.STAGES % 2);
    const int present = w.keys - (w.tiles - 1) * KEYS;
    if (i == 0 && present < KEYS) clear_tail(s, stage, present, group);
  };

  if (w.tiles > 0) {
    mbarrier_wait(&s.q_full, 0);
    wait_keys(0);
    wgmma_fence();
    multiply_keys<T>(scores, s, GROUP_ROWS * group, 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(scores);
    release(&s.k_free[0]);
    finish_scores(0);
    to_factor<T>(scores, factor);
    wait_keys(1);

    if (group == 1 && w.tiles > 1) barrier_arrive(TURN + 0, 2 * GROUP_THREADS);
    for (int i = 1; i < w.tiles; ++i) {
      const int stage = i % s.STAGES, before = (i - 1) % s.STAGES;
      wait_values(i - 1);
      barrier_sync(TURN + group, 2 * GROUP_THREADS);
      pin(scores), pin(sums), pin(factor);
      wgmma_fence();
      multiply_keys<T>(scores, s, GROUP_ROWS * group, stage);
      wgmma_commit();
      multiply_values<T, DIM>(sums, factor, s, before);
      wgmma_commit();
      // Nobody waits for a turn after the second warp group's last.
      if (group == 0 || i + 1 < w.tiles)
        barrier_arrive(TURN + 1 - group, 2 * GROUP_THREADS);
      wgmma_wait<1>();
      pin(scores);
      release(&s.k_free[stage]);
      finish_scores(i);
      pin(scores);
      // Here and not where the keys are needed: without a branch between the softmax and the next
      // line, ptxas 13.0 put that line first, and the softmax ran under no product.
      wait_keys(i + 1);
      wgmma_wait<0>();
      pin(sums), pin(factor);
      release(&s.v_free[before]);
#pragma unroll
      for (int j = 0; j < DIM / 2; ++j) sums[j] *= decay[j / 2 % 2];
      to_factor<T>(scores, factor);
    }

    wait_values(w.tiles - 1);
    pin(sums), pin(factor);
    wgmma_fence();
    multiply_values<T, DIM>(sums, factor, s, (w.tiles - 1) % s.STAGES);
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
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
      for (int stage = 0; stage < s.STAGES; ++stage) {
        mbarrier_init(&s.k_full[stage], 1);
        mbarrier_init(&s.v_full[stage], 1);
        mbarrier_init(&s.k_free[stage], CONSUMER_WARPS);
        mbarrier_init(&s.v_free[stage], CONSUMER_WARPS);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < GROUP_THREADS) {
      lower_registers<PRODUCER_REGISTERS>();
      if (threadIdx.x == 0 && w.tiles > 0) produce(s, q, k, v, w);
    } else {
      raise_registers<CONSUMER_REGISTERS>();
      consume<T>(s, a, w, threadIdx.x / GROUP_THREADS - 1);
    }
  } else {
    trap();  // the caller asks for a build for 90a and a Hopper GPU
  }
}

template <typename T, int DIM>
void forward(const Attention& a) {
  auto map = [&](const Attention::Heads& x, int64_t tokens, int64_t heads, int rows) {
    return tensor_map<T>(x.data, tokens, heads, DIM, x.token_stride, x.head_stride, rows);
  };
  const int64_t blocks = tiles_for(a.tokens, ROWS, a.documents) * a.heads;
  launch("attention_sm90", attention_forward_sm90_kernel<T, DIM>, dim3((unsigned)blocks),
         dim3(THREADS), sizeof(Shared<DIM>), (cudaStream_t)a.stream,
         map(a.q, a.tokens, a.heads, ROWS), map(a.k, a.keys, a.kv_heads, KEYS),
         map(a.v, a.keys, a.kv_heads, KEYS), a);
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

// A sequence's last queries against its paged cache of keys and values: a step of generation.
//
// Bound by memory, so everything serves to keep loads in flight. The query heads of one key head,
// of one query or of several, are the rows of a tile, for which the cache is read once; many queries
// are several tiles, each of which reads it, from L2 as a rule. A context is split over thread blocks
// (flash-decoding, Dao et al. 2023), and inside one over its warps, which share nothing until they
// are done: each has a ring of tiles that its own asynchronous copies fill, and its own softmax.
// The splits' results are added by a second kernel in a fixed order: equal calls give equal bits.
//
// bf16 and fp16 use the tensor cores even for a single query head: of the 16 rows that a product
// takes, idle ones cost nothing here, while multiplying in fp32 a group of eight heads would need 54
// of an A100's 64 multiply-adds per clock at full bandwidth. fp32, which has no such product, has
// tiles of four rows; a larger group reads the cache again, from L2 as a rule.
//
// Not yet run on a GPU.
#include <launch.cuh>
#include <ptx.cuh>

#include <stdexcept>

#include "attention.cuh"
#include "ops.h"
#include "vec.cuh"

namespace llama2rt {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int COMBINE_WARPS = 8, MAX_DIM = 256;
constexpr float NO_KEY = -INFINITY;  // the largest of no scores

// Where chunk `chunk` (16 bytes) of a row lies in a tile of rows of DIM elements: permuted, so that
// one chunk of eight neighbouring rows lies in all banks.
template <int DIM, typename T>
__device__ T* chunk_at(T* tile, int row, int chunk) {
  return tile + row * DIM + (chunk ^ (row & 7)) * (16 / (int)sizeof(T));
}

// Largest scores are subtracted before exponentials are taken; that of no scores is not.
__device__ inline float shift_of(float row_max) { return row_max == NO_KEY ? 0.0f : row_max; }

// What one warp has seen of its keys, for each of ROWS query rows: the largest score, the sum of
// exponentials relative to it, and that sum weighted with the values. A tile has KEYS keys from
// `start` on; row r sees those below `seen(r)`, and what lies beyond the last row's is zeros.
//
// Fragments of mma.m16n8k16: a lane holds rows lane / 4 and lane / 4 + 8 of a tile, and of each
// eight columns two, from 2 (lane % 4) on.
template <typename T, int DIM>
struct Partial {
  static constexpr int ROWS = 16, KEYS = 16;

  float sums[DIM / 8][4] = {};
  float row_max[2] = {NO_KEY, NO_KEY};
  float row_sum[2] = {};  // over this lane's columns
  uint32_t ends[2];

  template <typename Seen>
  __device__ explicit Partial(Seen seen) {
    for (int half = 0; half < 2; ++half) ends[half] = seen(threadIdx.x % 32 / 4 + 8 * half);
  }

  __device__ void add(T* q, T* k, T* v, uint32_t start, float scale2) {
    const int lane = threadIdx.x % 32;
    float scores[2][4] = {};
#pragma unroll
    for (int d = 0; d < DIM / 16; ++d) {
      uint32_t rows[4], keys[4];
      ptx::ldmatrix_x4(rows, chunk_at<DIM>(q, lane % 16, 2 * d + lane / 16));
      ptx::ldmatrix_x4(keys, chunk_at<DIM>(k, lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
      ptx::mma_m16n8k16<T>(scores[0], rows, {keys[0], keys[1]});
      ptx::mma_m16n8k16<T>(scores[1], rows, {keys[2], keys[3]});
    }
    const uint32_t column = start + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float higher = row_max[half];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i / 2 * 8 + column + i % 2 < ends[half])
          higher = fmaxf(higher, scores[i / 2][2 * half + i % 2]);
      higher = largest_of_lanes(higher, 1, 2);
      const float shift = shift_of(higher);
      const float decay = ptx::exp2((row_max[half] - shift) * scale2);
      row_max[half] = higher;
      row_sum[half] *= decay;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * half + i % 2];
        // The difference of near numbers is exact; that of their rounded multiples is not.
        const float p = ptx::exp2((score - shift) * scale2);
        score = i / 2 * 8 + column + i % 2 < ends[half] ? p : 0.0f;
        row_sum[half] += score;
      }
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) {
        sums[n][2 * half] *= decay;
        sums[n][2 * half + 1] *= decay;
      }
    }
    const uint32_t weights[4] = {
        pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
        pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
#pragma unroll
    for (int n = 0; n < DIM / 16; ++n) {
      uint32_t values[4];
      ptx::ldmatrix_x4_trans(values, chunk_at<DIM>(v, lane % 16, 2 * n + lane / 16));
      ptx::mma_m16n8k16<T>(sums[2 * n], weights, {values[0], values[1]});
      ptx::mma_m16n8k16<T>(sums[2 * n + 1], weights, {values[2], values[3]});
    }
  }

  // Into [ROWS, DIM], [ROWS], [ROWS].
  __device__ void store(float* sums_out, float* row_max_out, float* row_sum_out) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const float all = sum_of_lanes(row_sum[half], 1, 2);
      if (lane % 4 == 0) {
        row_max_out[row] = row_max[half];
        row_sum_out[row] = all;
      }
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          sums_out[row * DIM + 8 * n + lane % 4 * 2 + e] = sums[n][2 * half + e];
    }
  }
};

// fp32 has no tensor core products: for the scores a lane takes a quarter of key lane % 8, for the
// sums it takes the columns 2 lane + {0, 1} of each 64.
template <int DIM>
struct Partial<float, DIM> {
  static constexpr int ROWS = 4, KEYS = 8;

  float sums[ROWS][DIM / 32] = {};
  float row_max[ROWS] = {NO_KEY, NO_KEY, NO_KEY, NO_KEY};
  float row_sum[ROWS] = {};  // over key lane % 8 of the tiles
  uint32_t ends[ROWS];

  template <typename Seen>
  __device__ explicit Partial(Seen seen) {
    for (int row = 0; row < ROWS; ++row) ends[row] = seen(row);
  }

  __device__ void add(float* q, float* k, float* v, uint32_t start, float scale2) {
    const int lane = threadIdx.x % 32, key = lane % 8;
    float scores[ROWS] = {};
#pragma unroll 4
    for (int chunk = lane / 8; chunk < DIM / 4; chunk += 4) {
      const auto at_key = Pack<float, 4>::load(chunk_at<DIM>(k, key, chunk));
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const auto at_row = Pack<float, 4>::load(chunk_at<DIM>(q, row, chunk));
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[row] += at_row[i] * at_key[i];
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float score = sum_of_lanes(scores[row], 8, 16);
      const bool shown = start + key < ends[row];
      float higher = shown ? fmaxf(row_max[row], score) : row_max[row];
      higher = largest_of_lanes(higher, 1, 4);
      const float shift = shift_of(higher);
      const float decay = ptx::exp2((row_max[row] - shift) * scale2);
      row_max[row] = higher;
      scores[row] = shown ? ptx::exp2((score - shift) * scale2) : 0.0f;
      row_sum[row] = row_sum[row] * decay + scores[row];
#pragma unroll
      for (int i = 0; i < DIM / 32; ++i) sums[row][i] *= decay;
    }
#pragma unroll
    for (int from = 0; from < KEYS; ++from) {
      float weights[ROWS];
#pragma unroll
      for (int row = 0; row < ROWS; ++row)
        weights[row] = __shfl_sync(0xffffffff, scores[row], from);
#pragma unroll
      for (int j = 0; j < DIM / 64; ++j) {
        const int column = 2 * lane + 64 * j;
        const auto at_key =
            Pack<float, 2>::load(chunk_at<DIM>(v, from, column / 4) + column % 4);
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
#pragma unroll
          for (int e = 0; e < 2; ++e) sums[row][2 * j + e] += weights[row] * at_key[e];
      }
    }
  }

  __device__ void store(float* sums_out, float* row_max_out, float* row_sum_out) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float all = sum_of_lanes(row_sum[row], 1, 4);
      if (lane == 0) {
        row_max_out[row] = row_max[row];
        row_sum_out[row] = all;
      }
#pragma unroll
      for (int i = 0; i < DIM / 32; ++i)
        sums_out[row * DIM + 2 * lane + i / 2 * 64 + i % 2] = sums[row][i];
    }
  }
};

// The shared memory of a block: its query rows, then each warp's ring; at the end, over the rings,
// what the warps have summed. A tile of keys is as large for every T.
template <typename T, int DIM>
struct Layout {
  static constexpr int ROWS = Partial<T, DIM>::ROWS, KEYS = Partial<T, DIM>::KEYS;
  // 64 KiB in flight for two blocks on a multiprocessor. Memory asks for about 11 KB on the way to
  // each multiprocessor of an A100 (2 TB/s times 0.6 us over 108), 25 KB of an H200 (4.8 TB/s times
  // 0.7 us over 132).
  static constexpr int STAGES = DIM <= 64 ? 4 : 2;
  static constexpr int QUERIES = ROWS * DIM, TILE = KEYS * DIM;
  static constexpr int RING = STAGES * 2 * TILE;
  static constexpr size_t BYTES = (QUERIES + WARPS * RING) * sizeof(T);
  static_assert(WARPS * RING * sizeof(T) >= WARPS * ROWS * (DIM + 2) * sizeof(float));
};

// One tile of query rows of a sequence; the keys that its last row sees are those below `end`.
struct RowTile {
  QueryRows rows;
  int64_t sequence;
  uint32_t end;
  int diagonal;  // the last key that row 0 sees, the queries in between counted by QueryRows::step

  template <int ROWS>
  __device__ static RowTile make(const DecodeAttention& a, uint32_t tile, int64_t kv_head) {
    const int group = (int)(a.heads / a.kv_heads);
    Extent extent;
    int64_t token;
    int queries = 1;
    if (a.q_offsets.data == nullptr) {
      const uint32_t tiles = (group + ROWS - 1) / ROWS;
      extent = {tile / tiles, (int)(tile % tiles * ROWS)};
      token = extent.document;
    } else {
      const Offsets offsets = {a.q_offsets};
      extent = locate<ROWS>(offsets, a.sequences, group, tile);
      token = offsets[extent.document];
      queries = (int)(offsets[extent.document + 1] - token);
    }
    const QueryRows rows(group, token, kv_head * group, extent.first,
                         queries * group - extent.first, ROWS);
    const auto length = (int)Offsets{a.lengths}[extent.document];
    const int diagonal = length - queries + extent.first / group;
    const int seen = diagonal + rows.step(max(rows.count, 1) - 1) + 1;
    return {rows, extent.document, (uint32_t)max(seen, 0), diagonal};
  }

  // The keys that row r sees are those below.
  __device__ uint32_t seen(int r) const {
    return (uint32_t)max(diagonal + rows.step(min(r, rows.count - 1)) + 1, 0);
  }
};

// One sequence's keys and values of one head.
template <typename T, int DIM>
struct Cache {
  const DecodeAttention& a;
  const T *k, *v;
  int64_t table;  // the sequence's first entry in the block table
  uint32_t end;   // of the tokens that may be read
  bool aligned;   // rows can be copied 16 bytes at a time

  // The page of key `lane % KEYS` of the tile at token `start`.
  template <int KEYS>
  __device__ int64_t page(uint32_t start) const {
    const uint32_t token = start + threadIdx.x % KEYS;
    return token < end ? Offsets{a.block_table}[table + token / (uint32_t)a.page_size] : 0;
  }

  // Starts to copy the tile at token `start`, of which this lane knows `page`; zeros for what is
  // past the end or the head dimension.
  template <int KEYS>
  __device__ void copy(T* k_tile, T* v_tile, uint32_t start, int64_t page) const {
    constexpr int PER_CHUNK = 16 / sizeof(T), CHUNKS = DIM / PER_CHUNK;
    const int lane = threadIdx.x % 32;
    const uint32_t slot = (start + lane % KEYS) % (uint32_t)a.page_size;
    const int64_t k_row = page * a.k_cache.page_stride + slot * a.k_cache.token_stride;
    const int64_t v_row = page * a.v_cache.page_stride + slot * a.v_cache.token_stride;
#pragma unroll 4
    for (int i = 0; i < KEYS * CHUNKS / 32; ++i) {
      const int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
      const T* k_from = k + __shfl_sync(0xffffffff, k_row, row) + chunk * PER_CHUNK;
      const T* v_from = v + __shfl_sync(0xffffffff, v_row, row) + chunk * PER_CHUNK;
      T *k_to = chunk_at<DIM>(k_tile, row, chunk), *v_to = chunk_at<DIM>(v_tile, row, chunk);
      const int left = start + row < end ? (int)a.head_dim - chunk * PER_CHUNK : 0;
      if (aligned) {
        ptx::cp_async_16(k_to, k_from, left > 0);
        ptx::cp_async_16(v_to, v_from, left > 0);
      } else {
        for (int e = 0; e < PER_CHUNK; ++e) {
          k_to[e] = e < left ? k_from[e] : from_float<T>(0.0f);
          v_to[e] = e < left ? v_from[e] : from_float<T>(0.0f);
        }
      }
    }
  }
};

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 2)
    decode_attention_kernel(DecodeAttention a, bool aligned) {
  using L = Layout<T, DIM>;
  constexpr int ROWS = L::ROWS, KEYS = L::KEYS;
  const int warp = threadIdx.x / 32, dim = (int)a.head_dim;
  const uint32_t split = blockIdx.x % a.splits;
  const uint32_t kv_head = blockIdx.x / a.splits % (uint32_t)a.kv_heads;
  const uint32_t tile_index = blockIdx.x / a.splits / (uint32_t)a.kv_heads;
  const RowTile tile_rows = RowTile::make<ROWS>(a, tile_index, kv_head);
  const QueryRows& rows = tile_rows.rows;
  if (rows.count <= 0) return;
  float* const split_out = a.partial + split * a.tokens * a.heads * dim;
  float* const split_lse = a.lse + split * a.tokens * a.heads;

  // What a tile sees is cut into whole tiles of keys; of little the last splits get none.
  constexpr uint32_t TILE_KEYS = WARPS * KEYS;
  const uint32_t seen = tile_rows.end;
  const uint32_t share = ((seen + a.splits - 1) / a.splits + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS;
  const auto begin = (uint32_t)min((uint64_t)split * share, (uint64_t)seen);
  const uint32_t end = min(begin + share, seen);
  if (begin == end) {
    if (a.splits > 1) {
      if (threadIdx.x < rows.count) *rows.dense_row<float>(split_lse, a.heads, 1, threadIdx.x) = NO_KEY;
    } else {
      for (int i = threadIdx.x; i < rows.count * dim; i += THREADS)
        rows.dense_row<T>(a.out, a.heads, dim, i / dim)[i % dim] = from_float<T>(0.0f);
    }
    return;
  }

  T* queries = reinterpret_cast<T*>(shared_memory);
  T* ring = queries + L::QUERIES + warp * L::RING;
  const T* k = static_cast<const T*>(a.k_cache.data) + kv_head * a.k_cache.head_stride;
  const T* v = static_cast<const T*>(a.v_cache.data) + kv_head * a.v_cache.head_stride;
  const int64_t table = tile_rows.sequence * a.block_table_stride;
  const Cache<T, DIM> cache = {a, k, v, table, end, aligned};
  // This warp's tiles lie TILE_KEYS apart. A page number is fetched one tile before it is needed.
  uint32_t next = begin + warp * KEYS;
  int64_t page = cache.template page<KEYS>(next);
  auto copy_next = [&](int stage) {
    if (next < end) {
      T* tile = ring + stage * 2 * L::TILE;
      cache.template copy<KEYS>(tile, tile + L::TILE, next, page);
      next += TILE_KEYS;
      page = cache.template page<KEYS>(next);
    }
    ptx::cp_async_commit();
  };
  for (int stage = 0; stage < L::STAGES - 1; ++stage) copy_next(stage);

  for (int i = threadIdx.x; i < L::QUERIES; i += THREADS) {
    const int row = i / DIM, column = i % DIM, per_chunk = 16 / sizeof(T);
    chunk_at<DIM>(queries, row, column / per_chunk)[column % per_chunk] =
        row < rows.count && column < dim ? rows.row<T>(a.q, row)[column] : from_float<T>(0.0f);
  }
  __syncthreads();

  const float scale2 = a.scale * LOG2E;
  Partial<T, DIM> partial([&](int r) { return min(end, tile_rows.seen(r)); });
  int stage = 0;
  for (uint32_t start = begin + warp * KEYS; start < end; start += TILE_KEYS) {
    ptx::cp_async_wait<L::STAGES - 2>();
    // The other lanes' copies are there too, and the tile before this one is no longer read.
    __syncwarp();
    copy_next((stage + L::STAGES - 1) % L::STAGES);
    T* tile = ring + stage * 2 * L::TILE;
    partial.add(queries, tile, tile + L::TILE, start, scale2);
    stage = (stage + 1) % L::STAGES;
  }

  float* sums = reinterpret_cast<float*>(queries + L::QUERIES);
  float *warp_max = sums + WARPS * ROWS * DIM, *warp_sum = warp_max + WARPS * ROWS;
  __syncthreads();  // the rings are no longer read
  partial.store(sums + warp * ROWS * DIM, warp_max + warp * ROWS, warp_sum + warp * ROWS);
  __syncthreads();
  for (int i = threadIdx.x; i < rows.count * dim; i += THREADS) {
    const int row = i / dim, column = i % dim;
    float row_max = NO_KEY, row_sum = 0.0f, sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) row_max = fmaxf(row_max, warp_max[w * ROWS + row]);
    for (int w = 0; w < WARPS; ++w) {
      const float weight = ptx::exp2((warp_max[w * ROWS + row] - shift_of(row_max)) * scale2);
      row_sum += weight * warp_sum[w * ROWS + row];
      sum += weight * sums[(w * ROWS + row) * DIM + column];
    }
    const float result = row_max == NO_KEY ? 0.0f : sum / row_sum;
    if (a.splits == 1) {
      rows.dense_row<T>(a.out, a.heads, dim, row)[column] = from_float<T>(result);
    } else {
      rows.dense_row<float>(split_out, a.heads, dim, row)[column] = result;
      if (column == 0)
        *rows.dense_row<float>(split_lse, a.heads, 1, row) = row_max * scale2 + log2f(row_sum);
    }
  }
}

// The result of one row from those of its splits, which its warps share.
template <typename T>
__global__ void __launch_bounds__(32 * COMBINE_WARPS)
    decode_attention_combine_kernel(int64_t rows, int64_t splits, int dim, const float* partial,
                                    const float* lse, T* out) {
  constexpr int COLUMNS = MAX_DIM / 32;  // of each lane
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float row_max = NO_KEY;
  for (int64_t split = lane; split < splits; split += 32)
    row_max = fmaxf(row_max, lse[split * rows + row]);
  row_max = largest_of_lanes(row_max, 1, 16);
  float row_sum = 0.0f, sums[COLUMNS] = {};
  for (int64_t split = warp; split < splits; split += COMBINE_WARPS) {
    const float its_lse = lse[split * rows + row];
    if (its_lse == NO_KEY) continue;  // it has written nothing else
    const float weight = ptx::exp2(its_lse - row_max);
    row_sum += weight;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i)
      if (lane + 32 * i < dim) sums[i] += weight * partial[(split * rows + row) * dim + lane + 32 * i];
  }
  float *all_sums = reinterpret_cast<float*>(shared_memory), *warp_sum = all_sums + COMBINE_WARPS * dim;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i)
    if (lane + 32 * i < dim) all_sums[warp * dim + lane + 32 * i] = sums[i];
  if (lane == 0) warp_sum[warp] = row_sum;
  __syncthreads();
  for (int column = threadIdx.x; column < dim; column += 32 * COMBINE_WARPS) {
    float row_sum = 0.0f, sum = 0.0f;
    for (int w = 0; w < COMBINE_WARPS; ++w) {
      row_sum += warp_sum[w];
      sum += all_sums[w * dim + column];
    }
    out[row * dim + column] = from_float<T>(row_max == NO_KEY ? 0.0f : sum / row_sum);
  }
}

constexpr size_t combine_bytes(int64_t dim) { return COMBINE_WARPS * (dim + 1) * sizeof(float); }

bool aligned_caches(const DecodeAttention& a, size_t element_bytes) {
  int64_t all = (int64_t)((uintptr_t)a.k_cache.data | (uintptr_t)a.v_cache.data);
  for (const Pages& of : {a.k_cache, a.v_cache})
    for (int64_t elements : {a.head_dim, of.page_stride, of.token_stride, of.head_stride})
      all |= elements * (int64_t)element_bytes;
  return all % 16 == 0;
}

template <typename T, int DIM>
void run(const DecodeAttention& a) {
  using L = Layout<T, DIM>;
  const int64_t group = a.heads / a.kv_heads, rows = a.tokens * a.heads;
  const int64_t tiles = a.q_offsets.data ? tiles_for(a.tokens * group, L::ROWS, a.sequences)
                                         : a.sequences * ((group + L::ROWS - 1) / L::ROWS);
  const int64_t blocks = tiles * a.kv_heads * a.splits;
  if (blocks > 0x7fffffff) throw std::runtime_error("decode_attention: more than 2^31 - 1 blocks");
  const auto stream = (cudaStream_t)a.stream;
  launch<decode_attention_kernel<T, DIM>>("decode_attention", dim3((unsigned)blocks), dim3(THREADS),
                                          SharedBytes<L::BYTES>{}, stream, a,
                                          aligned_caches(a, sizeof(T)));
  if (a.splits > 1)
    launch<decode_attention_combine_kernel<T>>(
        "decode_attention", dim3((unsigned)rows), dim3(32 * COMBINE_WARPS),
        SharedBytes<combine_bytes(MAX_DIM)>{combine_bytes(a.head_dim)}, stream, rows, a.splits,
        (int)a.head_dim, (const float*)a.partial, (const float*)a.lse, (T*)a.out);
}

template <typename T>
void by_dim(const DecodeAttention& a) {
  if (a.head_dim <= 64) return run<T, 64>(a);
  if (a.head_dim <= 128) return run<T, 128>(a);
  if (a.head_dim <= MAX_DIM) return run<T, MAX_DIM>(a);
  throw std::runtime_error("decode_attention: head dimension above 256");
}

}  // namespace

void decode_attention(const DecodeAttention& a) {
  if (a.tokens == 0 || a.heads == 0 || a.head_dim == 0) return;
  DeviceGuard guard(a.device);
  switch (a.dtype) {
    case DType::fp32: return by_dim<float>(a);
    case DType::bf16: return by_dim<bf16>(a);
    case DType::fp16: return by_dim<f16>(a);
  }
}

}  // namespace llama2rt

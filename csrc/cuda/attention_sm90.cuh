// What the forward and backward kernels for Hopper share: the shape of their blocks, tiles in
// shared memory between TMA and wgmma, and the two ways in which they are multiplied.
//
// Named and inline, unlike elsewhere: in the passes for other architectures the kernels' bodies are
// left out, and nvcc would report everything of an anonymous namespace as unused.
//
// A warp group multiplies by wgmma.m64nNk16: sums [64, N] += factor [64, 16] b [16, N]. (PTX ISA,
// "Register Fragments" of wgmma.) Each of its four warps has 16 rows of the sums, and of those a
// thread the two rows g = lane / 4 and g + 8, in every 8 columns the two from 2 * (lane % 4) on:
//
//   columns                 0..7           8..15          16..23
//                       +--------------+--------------+--------------+--
//   warp w, row 16w + g | sums[0]  [1] | sums[4]  [5] | sums[8]  [9] | ...
//                       +--------------+--------------+--------------+--
//       row 16w + g + 8 | sums[2]  [3] | sums[6]  [7] | sums[10][11] | ...
//                       +--------------+--------------+--------------+--
//
// `first_row` is the former row, `row_half` tells which of the two an index belongs to, `column_of`
// and `first_column` give its column. A factor in registers, [64, 16], is laid out as two of these
// blocks of columns with two 16-bit elements a register; hence `to_factor` moves nothing between
// threads. A factor in shared memory, and b, are read by descriptor from tiles of 64 columns.
#pragma once

#include <launch.cuh>
#include <ptx_sm90.cuh>

#include "attention.cuh"
#include "ops.h"

namespace llama2rt::sm90 {

using namespace ptx;

// Three warp groups: one copies, two compute 64 rows each.
inline constexpr int GROUP_THREADS = 128, GROUP_ROWS = 64, ROWS = 2 * GROUP_ROWS;
inline constexpr int THREADS = 3 * GROUP_THREADS;
inline constexpr int CONSUMER_THREADS = 2 * GROUP_THREADS, CONSUMER_WARPS = CONSUMER_THREADS / 32;
// 65536 registers are 168 for each of 384 threads; the copying warp group hands most of its own to
// the others. The counts are those of arXiv:2407.08608's code for this shape of block.
inline constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
// Named barriers; 0 is __syncthreads().
inline constexpr int TURN = 1, TAIL = 3;

// Chunks of 64 columns = 128 bytes a row, as the swizzle wants them.
template <int DIM, int LENGTH>
using Tile = unsigned char[DIM / 64][LENGTH][128];

// A ring of STAGES slots that one thread fills and the computing warps empty: use i is of slot i
// % STAGES. That slot is full when the phase of parity(i) of its first barrier has ended, and free
// when that of parity(i) ^ 1 of the second has: of parity 1 it "has", before that of parity 0
// began.
template <int STAGES>
struct Ring {
  uint64_t full[STAGES], free[STAGES];

  __device__ void init() {
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&free[stage], CONSUMER_WARPS);
    }
  }
  __device__ static uint32_t parity(int i) { return i / STAGES % 2; }
};

// One lane reports for its warp: all of them have come through wgmma_wait together.
__device__ inline bool elect_one() { return threadIdx.x % 32 == 0; }

// Starts the copy of LENGTH tokens of one head from `token` on.
template <int CHUNKS, int LENGTH>
__device__ void load_tile(unsigned char (&to)[CHUNKS][LENGTH][128], const TensorMap& map,
                          uint64_t* barrier, int head, int64_t token) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk)
    load_box(to[chunk], map, barrier, 64 * chunk, head, (int)token);
}

// Zeros from row `from` on, by both computing warp groups together; show_cleared() must follow
// before either reads the tile.
template <int CHUNKS, int LENGTH>
__device__ void clear_rows(unsigned char (&tile)[CHUNKS][LENGTH][128], int from) {
  const int thread = threadIdx.x - GROUP_THREADS;
  for (int chunk = 0; chunk < CHUNKS; ++chunk)
    for (int i = from * 8 + thread; i < LENGTH * 8; i += CONSUMER_THREADS)
      store_zeros(&tile[chunk][0][0] + 16 * i);
}

// One barrier for both warp groups, though each could clear what it reads itself: then one would
// read by wgmma what the other still writes. The same zeros, but a race to the memory model.
__device__ inline void show_cleared() {
  fence_proxy_async();
  barrier_sync(TAIL, CONSUMER_THREADS);
}

// sums [64, LENGTH] = rows `row` to `row` + 63 of a, times the rows of b.
template <typename T, int HALF, int CHUNKS, int A_LENGTH, int LENGTH>
__device__ void multiply_rows(float (&sums)[HALF], const unsigned char (&a)[CHUNKS][A_LENGTH][128],
                              int row, const unsigned char (&b)[CHUNKS][LENGTH][128]) {
  static_assert(HALF == LENGTH / 2);
#pragma unroll
  for (int step = 0; step < 4 * CHUNKS; ++step) {
    const int chunk = step / 4, byte = step % 4 * 32;
    wgmma_shared(T{}, sums, matrix_descriptor(&a[chunk][row][byte], 0, 1024),
                 matrix_descriptor(&b[chunk][0][byte], 0, 1024), step > 0);
  }
}

// sums [64, columns of b] += factor [64, LENGTH] . b, the rows of b read as they lie.
template <typename T, int HALF, int CHUNKS, int LENGTH>
__device__ void multiply_columns(float (&sums)[HALF], const uint32_t (&factor)[LENGTH / 16][4],
                                 const unsigned char (&b)[CHUNKS][LENGTH][128]) {
  static_assert(HALF == 32 * CHUNKS);
#pragma unroll
  for (int step = 0; step < LENGTH / 16; ++step)
    wgmma_registers(T{}, sums, factor[step],
                    matrix_descriptor(b[0][16 * step], sizeof(b[0]), 1024));
}

// What a thread holds of the sums of one product is what it must hold of the left factor of the
// next, eight sums to a step of 16.
template <typename T, int HALF>
__device__ void to_factor(const float (&sums)[HALF], uint32_t (&factor)[HALF / 8][4]) {
#pragma unroll
  for (int i = 0; i < HALF; i += 2) factor[i / 8][i % 8 / 2] = pack<T>(sums[i], sums[i + 1]);
}

// Of the warp group's 64 rows: that of this thread's sums[0]; sums[2] belongs to the one 8 below.
__device__ inline int first_row() {
  return threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4;
}
// Row (0 or 8 below) and column of sums[i], the column relative to first_column().
__device__ constexpr int row_half(int i) { return i / 2 % 2; }
__device__ constexpr int column_of(int i) { return 8 * (i / 4) + i % 2; }
__device__ inline int first_column() { return threadIdx.x % 4 * 2; }

// Row r (0 or 1) of the thread's two, times `by`, to its row of a contiguous tensor.
template <typename T, int HALF>
__device__ void store_row(void* to, int64_t row, const float (&sums)[HALF], int r, float by) {
  T* target = static_cast<T*>(to) + row * (2 * HALF) + first_column();
#pragma unroll
  for (int i = 2 * r; i < HALF; i += 4)
    *reinterpret_cast<uint32_t*>(target + column_of(i)) = pack<T>(sums[i] * by, sums[i + 1] * by);
}

// 128 queries of one head. Tiles of rows are shared out as in attention.cuh, a query head at a
// time: `section` key heads, whose keys and values then stay in the cache, before the next ones.
template <int KEYS>
struct QueryWork {
  int64_t query_start, key_start;  // tokens
  int queries, keys;               // of the document
  int first;                       // query of the tile's first row
  int head, kv_head;
  int shift;  // query i sees keys up to i + shift, if causal
  int tiles;  // of keys that some row sees

  __device__ explicit QueryWork(const Attention& a) {
    const int group = (int)(a.heads / a.kv_heads);
    const int64_t tiles_of_rows = tiles_for(a.tokens, ROWS, a.documents);
    const TileAndHead at = schedule(tiles_of_rows, a.heads, a.k_section * group);
    // The last tiles of a document see most keys: they start first, and short ones fill the end.
    const Extent extent =
        locate<ROWS>(q_offsets(a), a.documents, 1, tiles_of_rows - 1 - at.tile);
    query_start = q_offsets(a)[extent.document];
    key_start = k_offsets(a)[extent.document];
    queries = (int)(q_offsets(a)[extent.document + 1] - query_start);
    keys = (int)(k_offsets(a)[extent.document + 1] - key_start);
    first = extent.first;
    head = (int)at.head;
    kv_head = head / group;
    shift = keys - queries;
    const int seen = a.causal ? max(min(first + ROWS, queries) + shift, 0) : keys;
    tiles = (seen + KEYS - 1) / KEYS;
  }

  // Of a tile's keys, from `key` on, counted from there: the last that query `row` sees.
  __device__ int last(const Attention& a, int row, int key) const {
    return (a.causal ? min(row + shift, keys - 1) : keys - 1) - key;
  }
  // Whether some of the 64 rows from `row` on do not see all keys of the tile.
  __device__ bool masked(const Attention& a, int row, int key) const {
    return last(a, row, key) < KEYS - 1;
  }
};

template <typename T, int DIM>
TensorMap heads_map(const Heads& x, int64_t tokens, int64_t heads, int length) {
  return tensor_map<T>(x.data, tokens, heads, DIM, x.token_stride, x.head_stride, length);
}

}  // namespace llama2rt::sm90

// What the attention kernels share: which rows a thread block owns, and tiles of 16-bit elements in
// shared memory, between asynchronous copies and the tensor cores.
//
// The query heads that share a key head are packed into the rows of one tile: row r of a document
// is token r / group, head r % group of the group. Keys are then read once for the group, a short
// document fills its tile, and the sum over the group in dk and dv is part of the matrix product.
//
// A warp multiplies by mma.m16n8k16, c [16, 8] += a [16, 16] b [16, 8] (PTX ISA, "Matrix Fragments
// for mma.m16n8k16"). Its operands consist of quarters of 8 x 8; a[i] and b[i] are registers with two
// 16-bit elements each, c[i] fp32:
//
//                   a                      b                c
//   columns    0..7    8..15             0..7             0..7
//            +-------+-------+         +-------+       +-----------+
//   row 0..7 | a[0]  | a[2]  |     k   | b[0]  |   row | c[0] c[1] |
//            +-------+-------+         +-------+       +-----------+
//      8..15 | a[1]  | a[3]  |         | b[1]  |       | c[2] c[3] |
//            +-------+-------+         +-------+       +-----------+
//
// In each quarter a lane holds two neighbours: of a and c in row lane / 4, columns 2 * (lane % 4) and
// the next; of b in column lane / 4, those rows.
//
//            columns of a, c;  rows k of b
//              0   1   2   3   4   5   6   7
//            +-------+-------+-------+-------+
//   row of a,| lane 0|   1   |   2   |   3   |  0
//   c; column|   4   |   5   |   6   |   7   |  1
//   of b     |  ...  |       |       |       |
//            |  28   |  29   |  30   |  31   |  7
//            +-------+-------+-------+-------+
//
// So the c of two neighbouring products are laid out as one a: what a product gives is, rounded, an
// operand of the next (`operand`), and a row of c belongs to four lanes.
#pragma once

#include <launch.cuh>
#include <ptx.cuh>

#include <stdexcept>
#include <type_traits>

#include "ops.h"
#include "vec.cuh"

namespace llama2rt {

// ---- which rows ----

template <typename T>
__device__ const T* row_of(const Heads& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

struct Offsets : Indices {
  __device__ int64_t operator[](int64_t i) const {
    return are_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

__device__ inline Offsets q_offsets(const Attention& a) { return {a.q_offsets}; }
__device__ inline Offsets k_offsets(const Attention& a) { return {a.k_offsets}; }

// Tiles of up to `size` rows that suffice for all documents, whatever their lengths.
__host__ __device__ inline int64_t tiles_for(int64_t rows, int size, int64_t documents) {
  return rows / size + documents;
}

struct TileAndHead {
  int64_t tile;
  int64_t head;  // of keys
};

// All tiles of `section` key heads in their order, then those of the next heads.
__device__ inline TileAndHead schedule(int64_t tiles, int64_t kv_heads, int64_t section) {
  const uint32_t in_section = (uint32_t)(tiles * section);
  const uint32_t index = blockIdx.x / in_section, inside = blockIdx.x % in_section;
  const int64_t first = index * section;
  const uint32_t width = (uint32_t)(kv_heads - first < section ? kv_heads - first : section);
  return {inside / width, first + inside % width};
}

struct Extent {
  int64_t document;
  int first;  // row of the document at which the tile starts; may lie past its end
};

// Document i owns the tiles from offsets[i] * group / SIZE + i on: always enough for its rows, at
// most one too many, and known without a table, so that nothing waits for the host.
template <int SIZE>
__device__ Extent locate(const Offsets& offsets, int64_t documents, int64_t group, int64_t tile) {
  int64_t low = 0, high = documents;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] * group / SIZE + middle <= tile ? low : high) = middle;
  }
  return {low, (int)((tile - (offsets[low] * group / SIZE + low)) * SIZE)};
}

// Up to `size` packed rows of a document, from row `first` on.
struct QueryRows {
  uint32_t group, reciprocal, rest;  // rest: row 0's query head inside the group
  int64_t token, q_head;             // of row 0, and the group's first query head
  int count;                         // rows that exist: none if not above 0

  __device__ QueryRows(int group, int64_t document_token, int64_t q_head, int first, int left,
                       int size)
      : group(group),
        reciprocal((0x80000000u + group - 1) / group),
        rest(first % group),
        token(document_token + first / group),
        q_head(q_head),
        count(left < size ? left : size) {}

  // Tokens after row 0's, and query head inside the group, of row r. The division is a
  // multiplication, exact while (rest + r) * group < 2^31.
  __device__ int step(int r) const { return (int)(((uint64_t)(rest + r) * reciprocal) >> 31); }
  __device__ int member(int r) const { return (int)(rest + r) - step(r) * (int)group; }

  // Row r of a tensor of query heads, null past the last; of a contiguous one; of a statistic.
  template <typename T>
  __device__ const T* row(const Heads& x, int r) const {
    return r < count ? row_of<T>(x, token + step(r), q_head + member(r)) : nullptr;
  }
  template <typename T>
  __device__ T* dense_row(void* x, int64_t heads, int64_t dim, int r) const {
    const int64_t index = (token + step(r)) * heads + q_head + member(r);
    return r < count ? static_cast<T*>(x) + index * dim : nullptr;
  }
  __device__ int64_t statistic(int64_t tokens, int r) const {
    return (q_head + member(r)) * tokens + token + step(r);
  }
};

// A tile of query rows and the keys they see: those below `full` are seen by all rows, from `end`
// on by none; in between, row r sees those up to last(r).
struct QueryTile {
  QueryRows rows;
  int64_t head, key;  // key head, and the document's first key
  int keys, diagonal, full, end;
  bool causal;

  template <int ROWS, int KEYS>
  __device__ static QueryTile make(const Attention& a) {
    const int group = (int)(a.heads / a.kv_heads);
    const int64_t tiles = tiles_for(a.tokens * group, ROWS, a.documents);
    const TileAndHead at = schedule(tiles, a.kv_heads, a.k_section);
    // The last tiles of a document see most keys: they start first, and short ones fill the end.
    const Extent extent = locate<ROWS>(q_offsets(a), a.documents, group, tiles - 1 - at.tile);
    const int64_t query = q_offsets(a)[extent.document], key = k_offsets(a)[extent.document];
    const int queries = (int)(q_offsets(a)[extent.document + 1] - query);
    const int keys = (int)(k_offsets(a)[extent.document + 1] - key);
    const QueryRows rows(group, query, at.head * group, extent.first,
                         queries * group - extent.first, ROWS);
    const int diagonal = extent.first / group + keys - queries;
    int full = keys / KEYS * KEYS, end = keys;
    if (a.causal) {
      full = max(diagonal + 1, 0) / KEYS * KEYS;
      end = max(diagonal + rows.step(max(rows.count, 1) - 1) + 1, 0);
    }
    return {rows, at.head, key, keys, diagonal, full, end, a.causal};
  }

  __device__ int last(int r) const { return causal ? diagonal + rows.step(r) : keys - 1; }
};

// A tile of keys and the packed query rows of its document that see them: those from `begin` on see
// its first key, those from `full` on all of them.
struct KeyTile {
  int64_t head, token, query;  // key head, first key, and the document's first query
  int group, first, count, shift, rows, begin, full;

  template <int KEYS>
  __device__ static KeyTile make(const Attention& a) {
    const int group = (int)(a.heads / a.kv_heads);
    const int64_t tiles = tiles_for(a.keys, KEYS, a.documents);
    // The first keys of a document are seen by most rows: here the long tiles lie at the front.
    const TileAndHead at = schedule(tiles, a.kv_heads, a.q_section);
    const Extent extent = locate<KEYS>(k_offsets(a), a.documents, 1, at.tile);
    const int64_t query = q_offsets(a)[extent.document], key = k_offsets(a)[extent.document];
    const int queries = (int)(q_offsets(a)[extent.document + 1] - query);
    const int keys = (int)(k_offsets(a)[extent.document + 1] - key);
    const int count = min(KEYS, keys - extent.first), shift = keys - queries;
    int begin = 0, full = 0;
    if (a.causal) {
      begin = max(extent.first - shift, 0) * group;
      full = max(extent.first + count - 1 - shift, 0) * group;
    }
    return {at.head, key + extent.first, query, group,  extent.first, count,
            shift,      queries * group,    begin, full};
  }

  __device__ QueryRows rows_from(int start, int size) const {
    return QueryRows(group, query, head * group, start, rows - start, size);
  }
  // Row r of keys or values, null past the last; of a contiguous tensor of them.
  template <typename T>
  __device__ const T* row(const Heads& x, int r) const {
    return r < count ? row_of<T>(x, token + r, head) : nullptr;
  }
  template <typename T>
  __device__ T* dense_row(void* x, int64_t kv_heads, int64_t dim, int r) const {
    return r < count ? static_cast<T*>(x) + ((token + r) * kv_heads + head) * dim : nullptr;
  }
};

// ---- tiles in shared memory ----

// Index of the first element of a 16-byte chunk. Chunks are permuted within the 128 bytes that all
// banks hold at once, so that eight rows' chunks of one column, which ldmatrix reads together, lie
// in different banks.
template <int DIM>
__device__ int at(int row, int chunk) {
  const int swizzled = DIM % 64 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  return row * DIM + swizzled * 8;
}

// Starts to copy ROWS rows; row(r) is where row r lies, null for a row of zeros, as are the columns
// from `dim` on.
template <int ROWS, int DIM, int THREADS, typename T, typename Row>
__device__ void load_tile(T* tile, int dim, Row row) {
  constexpr int CHUNKS = DIM / 8;
  // Unrolled whole, the compiler would keep every row's offset in registers through the loop.
#pragma unroll 2
  for (int i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; ++i) {
    const int item = i * THREADS + threadIdx.x, r = item / CHUNKS, chunk = item % CHUNKS;
    if (ROWS * CHUNKS % THREADS != 0 && r >= ROWS) return;
    const T* source = row(r);
    ptx::cp_async_16(tile + at<DIM>(r, chunk), source + chunk * 8,
                     source != nullptr && chunk * 8 < dim);
  }
}

// c += a b^T: a is 16 M rows of a tile from `first` on, b is N rows of another.
template <int M, int N, int DIM, typename T>
__device__ void multiply_rows(float (&c)[M][N / 8][4], const T* a, int first, const T* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
      ptx::ldmatrix_x4(left[m], a + at<DIM>(first + m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right,
                       b + at<DIM>(n * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(c[m][2 * n], left[m], even);
        ptx::mma_m16n8k16<T>(c[m][2 * n + 1], left[m], odd);
      }
    }
  }
}

// c += a b: a [16 M, K] as `operand` makes it; b is K rows of a tile, COLUMNS columns of it from
// chunk `first` on.
template <int M, int K, int COLUMNS, int DIM, typename T>
__device__ void multiply_columns(float (&c)[M][COLUMNS / 8][4], const uint32_t (&a)[M][K / 16][4],
                                 const T* b, int first = 0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < K / 16; ++k)
#pragma unroll
    for (int n = 0; n < COLUMNS / 16; ++n) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, b + at<DIM>(k * 16 + lane % 16, first + 2 * n + lane / 16));
      const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(c[m][2 * n], a[m][k], even);
        ptx::mma_m16n8k16<T>(c[m][2 * n + 1], a[m][k], odd);
      }
    }
}

// Products of one multiplication, rounded to T, as the left operand of the next: the layouts of
// mma's result and operand agree, so nothing moves between lanes.
template <typename T, int M, int N>
__device__ void operand(uint32_t (&a)[M][N / 2][4], const float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      a[m][n / 2][n % 2 * 2] = pack<T>(c[m][n][0], c[m][n][1]);
      a[m][n / 2][n % 2 * 2 + 1] = pack<T>(c[m][n][2], c[m][n][3]);
    }
}

// Writes a warp's 16 M rows times factor(m, half): first into its own rows of `tile`, then, 16
// bytes a lane, to row(r), null for a row that does not exist.
template <int M, int COLUMNS, int DIM, typename T, typename Factor, typename Row>
__device__ void store_rows(T* tile, int first_row, const float (&c)[M][COLUMNS / 8][4],
                           int first_chunk, int dim, Factor factor, Row row) {
  constexpr int CHUNKS = COLUMNS / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float by = factor(m, half);
      const int r = first_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < CHUNKS; ++n)
        *reinterpret_cast<uint32_t*>(tile + at<DIM>(r, first_chunk + n) + lane % 4 * 2) =
            pack<T>(c[m][n][2 * half] * by, c[m][n][2 * half + 1] * by);
    }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * M * CHUNKS; i += 32) {
    const int r = first_row + i / CHUNKS, chunk = first_chunk + i % CHUNKS;
    T* target = row(r);
    if (target != nullptr && chunk * 8 < dim)
      Pack<T, 8>::load(tile + at<DIM>(r, chunk)).store(target + chunk * 8);
  }
}

// ---- on the host ----

// attention_fp32.cu: without tensor cores, which would round fp32 to 10 bits.
void attention_fp32(const Attention& a);
void attention_backward_fp32(const AttentionBackward& b);

inline dim3 grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("more thread blocks than a grid can have");
  return dim3((unsigned)blocks);
}

// Calls run(T, DIM) for the 16-bit type and the padded head dimension, both known to the compiler.
template <typename Run>
void by_shape(const Attention& a, Run run) {
  auto with = [&](auto t) {
    if (a.head_dim <= 32) return run(t, std::integral_constant<int, 32>{});
    if (a.head_dim <= 64) return run(t, std::integral_constant<int, 64>{});
    if (a.head_dim <= 96) return run(t, std::integral_constant<int, 96>{});
    if (a.head_dim <= 128) return run(t, std::integral_constant<int, 128>{});
    if (a.head_dim <= 192) return run(t, std::integral_constant<int, 192>{});
    run(t, std::integral_constant<int, 256>{});
  };
  a.dtype == DType::bf16 ? with(bf16{}) : with(f16{});
}

}  // namespace llama2rt

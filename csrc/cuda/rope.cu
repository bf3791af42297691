// Rotary position embedding (arXiv:2104.09864) of queries and keys in one launch, and its inverse.
//
//   (a, b) = (x[i], x[i + D/2]) -> (a cos - b sin, b cos + a sin)
//
// The gradient is the rotation by the opposite angle: the same kernel with sin negated. A head of a
// token is a row of D/2 pairs. A tile is a few rows, of q in the first tiles and of k in the others,
// and a fixed number of blocks goes through them all. The heads of a token find its row of the
// tables in the L1 cache.
//
// Not yet run on a GPU.
#include <launch.cuh>

#include "vec.cuh"

namespace llama2rt {
namespace {

constexpr int MAX_THREADS = 128;
// Blocks on a multiprocessor, and so 64 registers a thread: each thread has 32 bytes of x in flight,
// all together 32 KiB, twice what 4.8 TB/s over 132 multiprocessors bring in 400 ns of latency.
constexpr int BLOCKS = 8;

template <typename T>
struct HeadsOf {
  const T* x;
  int64_t heads, token_stride, head_stride;
  T* y;
};

struct Angles {
  const float *cos, *sin;
  int64_t rows;
  Indices positions;
  float sign;
};

template <int WIDTH>
__device__ void load_floats(const float* p, float (&values)[WIDTH]) {
  constexpr int STEP = WIDTH < 4 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < WIDTH; i += STEP) {
    const auto pack = Pack<float, STEP>::load(p + i);
#pragma unroll
    for (int j = 0; j < STEP; ++j) values[i + j] = pack[j];
  }
}

// cos and sin of pairs [pair, pair + WIDTH) of a token; NaN, without reading, where its position
// lies outside the tables.
template <int WIDTH>
__device__ void load_angles(const Angles& angles, int64_t token, int64_t half, int64_t pair,
                            float (&cos)[WIDTH], float (&sin)[WIDTH]) {
  const int64_t position = angles.positions.are_int64
                               ? static_cast<const int64_t*>(angles.positions.data)[token]
                               : static_cast<const int*>(angles.positions.data)[token];
  if (position >= 0 && position < angles.rows) {
    load_floats(angles.cos + position * half + pair, cos);
    load_floats(angles.sin + position * half + pair, sin);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) cos[i] = sin[i] = NAN;
  }
}

// Turns rows [first, first + blockDim.y) of the tokens * heads rows of x.
template <typename T, int WIDTH>
__device__ void rotate_tile(const HeadsOf<T>& of, int64_t tokens, int64_t half,
                            const Angles& angles, int64_t first) {
  // One division in 64 bits for the tile; the thread's own row follows in 32.
  const int64_t first_token = first / of.heads;
  const auto heads = (unsigned)of.heads;
  const unsigned within = (unsigned)(first - first_token * heads) + threadIdx.y;
  const int64_t token = first_token + within / heads, row = first + threadIdx.y;
  if (token >= tokens) return;
  const T* x = of.x + token * of.token_stride + within % heads * of.head_stride;
  T* y = of.y + row * 2 * half;
  for (int64_t pair = threadIdx.x * WIDTH; pair < half; pair += blockDim.x * WIDTH) {
    const auto a = Pack<T, WIDTH>::load(x + pair), b = Pack<T, WIDTH>::load(x + half + pair);
    float cos[WIDTH], sin[WIDTH];
    load_angles(angles, token, half, pair, cos, sin);
    Pack<T, WIDTH> turned_a, turned_b;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float s = sin[i] * angles.sign;
      turned_a.set(i, a[i] * cos[i] - b[i] * s);
      turned_b.set(i, b[i] * cos[i] + a[i] * s);
    }
    turned_a.store(y + pair);
    turned_b.store(y + half + pair);
  }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    rope_kernel(HeadsOf<T> q, HeadsOf<T> k, int64_t tokens, int64_t half, Angles angles,
                int64_t q_tiles, int64_t tiles) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x)
    if (tile < q_tiles)
      rotate_tile<T, WIDTH>(q, tokens, half, angles, tile * blockDim.y);
    else
      rotate_tile<T, WIDTH>(k, tokens, half, angles, (tile - q_tiles) * blockDim.y);
}

// Whether both halves of every head begin at a multiple of 16 bytes.
template <typename T>
bool aligned_heads(const RopeHeads& of, int64_t half) {
  return aligned<T>(of.x.data, of.x.token_stride) &&
         aligned<T>(of.x.data, of.x.head_stride) &&
         aligned<T>(of.y, half);
}

template <typename T>
void run(const Rope& a) {
  const int64_t half = a.head_dim / 2;
  const bool wide = half * sizeof(T) % 16 == 0 && aligned_heads<T>(a.q, half) &&
                    aligned_heads<T>(a.k, half) && aligned<float>(a.cos, half) &&
                    aligned<float>(a.sin, half);
  by_width<T>(wide, [&](auto width) {
    const int64_t packs = half / width();
    const auto across = (unsigned)(packs < MAX_THREADS ? packs : MAX_THREADS);
    const dim3 block(across, MAX_THREADS / across);
    auto heads = [](const RopeHeads& of) {
      return HeadsOf<T>{(const T*)of.x.data, of.heads, of.x.token_stride, of.x.head_stride,
                        (T*)of.y};
    };
    auto tiles = [&](const RopeHeads& of) {
      return divide_up(a.tokens * of.heads, block.y);
    };
    const int64_t q_tiles = tiles(a.q), all = q_tiles + tiles(a.k);
    launch<rope_kernel<T, width()>>(
        "rope", dim3((unsigned)(all < a.blocks ? all : a.blocks)), block, SharedBytes<0>{},
        (cudaStream_t)a.stream, heads(a.q), heads(a.k), a.tokens, half,
        Angles{a.cos, a.sin, a.table_rows, a.positions, a.inverse ? -1.0f : 1.0f},
        q_tiles, all);
  });
}

}  // namespace

void rope(const Rope& a) {
  if (a.tokens * (a.q.heads + a.k.heads) == 0 || a.head_dim == 0) return;
  DeviceGuard guard(a.device);
  by_dtype(a.dtype, [&](auto t) { run<decltype(t)>(a); });
}

}  // namespace llama2rt

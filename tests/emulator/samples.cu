// Small kernels for the tests of the emulator itself: each does one thing right, or one wrong.
#include <launch.cuh>
#include <ptx.cuh>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/vec.cuh"
#include "../../csrc/emulator/emulator.h"

namespace py = pybind11;
using namespace llama2rt;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <auto KERNEL, typename... Arguments>
void go(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  py::gil_scoped_release release;
  launch<KERNEL>(name, grid, block, SharedBytes<SIZE_MAX>{shared_bytes}, nullptr, arguments...);
}

// ---- The order of threads ----

__global__ void order_kernel(unsigned* turn, unsigned* seen) {
  seen[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(turn, 1u);
}

// The index of every thread as the kernel sees it.
__global__ void index_kernel(int* seen) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  seen[block * (int)(blockDim.x * blockDim.y * blockDim.z) + thread] += 1 + block * 1000 + thread;
}

// ---- Memory ----

__constant__ const int TABLE[4] = {2, 3, 5, 7};

__global__ void table_kernel(int* y) { y[threadIdx.x] = TABLE[threadIdx.x % 4]; }

__global__ void touch_kernel(float* p, int64_t offset, bool writes, float* sink) {
  if (threadIdx.x != 3) return;
  if (writes)
    p[offset] = 1.0f;
  else
    *sink = p[offset];
}

__global__ void unaligned_kernel(float* p, float* sink) {
  Pack<float, 4>::load(p + 1).store(sink);
}

__global__ void overflow_kernel(int x, int* sink) { *sink = x * x; }

__global__ void array_kernel(int i, int* sink) {
  int values[4] = {1, 2, 3, 4};
  *sink = values[i];
}

__global__ void shared_kernel(int64_t offset, float* sink) {
  *sink = ((float*)shared_memory)[offset];
}

__global__ void uninitialised_kernel(float* shared, float* local) {
  float values[4];
  *shared = ((float*)shared_memory)[threadIdx.x];
  *local = values[threadIdx.x];
}

// ---- Barriers ----

// y = x reversed within the block, through shared memory, twice over.
__global__ void reverse_kernel(const float* x, float* y) {
  float* held = (float*)shared_memory;
  const int last = blockDim.x - 1;
  for (int turn = 0; turn < 2; ++turn) {
    held[threadIdx.x] = x[turn * blockDim.x + threadIdx.x];
    __syncthreads();
    y[turn * blockDim.x + threadIdx.x] = held[last - threadIdx.x];
    __syncthreads();
  }
}

__global__ void early_exit_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void diverged_barrier_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void diverged_warp_kernel(int* y) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    y[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 2);
}

// Warp 0 hands over a value through barrier 1, which it does not wait at; warps 2 and 3 use another.
__global__ void named_barriers_kernel(float* y) {
  float* held = (float*)shared_memory;
  const int warp = threadIdx.x / 32;
  if (warp == 0) {
    held[threadIdx.x] = threadIdx.x;
    ptx::barrier_arrive(1, 64);
  } else if (warp == 1) {
    ptx::barrier_sync(1, 64);
    y[threadIdx.x - 32] = held[63 - threadIdx.x];
  } else {
    held[threadIdx.x] = threadIdx.x;
    ptx::barrier_sync(2, 64);
    y[threadIdx.x - 32] = held[191 - threadIdx.x];
  }
}

// Lane i of each warp writes, lane 31 - i reads.
__global__ void warp_barrier_kernel(float* y) {
  float* held = (float*)shared_memory + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32;
  held[lane] = lane;
  __syncwarp();
  y[threadIdx.x] = held[31 - lane];
}

// ---- Lanes of a warp ----

__global__ void shuffles_kernel(int* y) {
  const int lane = threadIdx.x;
  int results[] = {
      __shfl_sync(0xffffffff, 10 * lane, 5),
      __shfl_sync(0xffffffff, 10 * lane, 1, 8),
      __shfl_xor_sync(0xffffffff, 10 * lane, 3),
      __shfl_up_sync(0xffffffff, 10 * lane, 2),
      __shfl_down_sync(0xffffffff, 10 * lane, 2, 16),
      (int)__ballot_sync(0xffffffff, lane % 3 == 0),
      __any_sync(0xffffffff, lane == 7),
      __all_sync(0xffffffff, lane != 7),
  };
  for (int i = 0; i < 8; ++i) y[i * 32 + lane] = results[i];
  // Halves of the warp apart, in a branch of their own.
  if (lane < 16) y[256 + lane] = __shfl_xor_sync(0x0000ffff, lane, 1);
  else y[256 + lane] = __shfl_xor_sync(0xffff0000, -lane, 1);
}

// ---- Asynchronous copies: y = x through two stages of shared memory, one packet of 16 bytes a
// thread; packets from `valid` on are not read and give 0 ----

__global__ void copy_kernel(const float* x, float* y, int tiles, int valid) {
  float* stages = (float*)shared_memory;
  const int packets = blockDim.x;
  auto fetch = [&](int tile) {
    const int packet = tile * packets + threadIdx.x;
    ptx::cp_async_16(stages + (tile % 2 * packets + threadIdx.x) * 4, x + packet * 4, packet < valid);
    ptx::cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      fetch(tile + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const int other = packets - 1 - threadIdx.x;  // what another thread has fetched
    for (int i = 0; i < 4; ++i)
      y[(tile * packets + other) * 4 + i] = stages[(tile % 2 * packets + other) * 4 + i];
    __syncthreads();
  }
}

// ---- Matrices: d [16, 8] = a [16, 16] @ b, b [16, 8] (transposed: b [8, 16] as rows of columns) --

template <typename T>
__global__ void product_kernel(const T* a, const T* b, bool b_is_transposed, float* d) {
  T *a_tile = (T*)shared_memory, *b_tile = a_tile + 256;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a_tile[i] = a[i];
  for (int i = lane; i < 128; i += 32) b_tile[i] = b[i];
  __syncwarp();
  uint32_t a_part[4], b_part[2];
  ptx::ldmatrix_x4(a_part, a_tile + lane % 16 * 16 + lane / 16 * 8);
  if (b_is_transposed)
    ptx::ldmatrix_x2(b_part, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
  else
    ptx::ldmatrix_x2_trans(b_part, b_tile + lane % 16 * 8);
  float sums[4] = {};
  ptx::mma_m16n8k16<T>(sums, a_part, b_part);
  ptx::mma_m16n8k16<T>(sums, a_part, b_part);  // onto what is there: twice the product
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// Matrices 0 to 3 of 8 x 8, one after the other: each transposed in its place.
__global__ void transpose_kernel(const uint16_t* x, uint16_t* y) {
  uint16_t* tile = (uint16_t*)shared_memory;
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, tile + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j)
      y[i * 64 + threadIdx.x / 4 * 8 + threadIdx.x % 4 * 2 + j] = (uint16_t)(r[i] >> 16 * j);
}

// ---- Numbers ----

template <typename T>
__global__ void round_kernel(const float* x, T* y, float* back, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    y[i] = from_float<T>(x[i]);
    back[i] = to_float(y[i]);
  }
}

__global__ void exp2_kernel(const float* x, float* y) {
  y[threadIdx.x] = ptx::exp2(x[threadIdx.x]);
}

// ---- Work beside the threads: each thread starts a job that adds one, and waits for them all ----

struct Count {
  unsigned* jobs;
  unsigned wanted;
};

__global__ void deferred_kernel(unsigned* jobs, unsigned* seen) {
  emulator::defer([=] { ++*jobs; });
  Count count{jobs, blockDim.x};
  emulator::wait_until("the jobs", [](void* c) {
    return *static_cast<Count*>(c)->jobs == static_cast<Count*>(c)->wanted;
  }, &count);
  seen[threadIdx.x] = *jobs;
}

}  // namespace

PYBIND11_MODULE(_samples, m) {
  m.def("set_seed", &emulator::set_seed);
  m.def("set_os_threads", &emulator::set_os_threads);
  m.def("set_buffers", &emulator::set_buffers);
  m.def("sync_points", &emulator::sync_points);
  m.def("leave_out", &emulator::leave_out);
  m.def("order", [](int blocks, int threads, Address turn, Address seen) {
    go<order_kernel>("order", blocks, threads, 0, at<unsigned>(turn), at<unsigned>(seen));
  });
  m.def("index", [](std::array<unsigned, 3> grid, std::array<unsigned, 3> block, Address seen) {
    go<index_kernel>("index", dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
       0, at<int>(seen));
  });
  m.def("table", [](Address y) { go<table_kernel>("table", 1, 32, 0, at<int>(y)); });
  m.def("touch", [](Address p, int64_t offset, bool writes, Address sink) {
    go<touch_kernel>("touch", 2, 4, 0, at<float>(p), offset, writes, at<float>(sink));
  });
  m.def("unaligned", [](Address p, Address sink) {
    go<unaligned_kernel>("unaligned", 1, 1, 0, at<float>(p), at<float>(sink));
  });
  m.def("overflow", [](int x, Address sink) {
    go<overflow_kernel>("overflow", 1, 1, 0, x, at<int>(sink));
  });
  m.def("array", [](int i, Address sink) {
    go<array_kernel>("array", 1, 1, 0, i, at<int>(sink));
  });
  m.def("shared", [](size_t bytes, int64_t offset, Address sink) {
    go<shared_kernel>("shared", 1, 1, bytes, offset, at<float>(sink));
  });
  m.def("more_shared", [](Address sink) {
    launch<shared_kernel>("more_shared", 1, 1, SharedBytes<64>{65}, nullptr, int64_t{0},
                          at<float>(sink));
  });
  m.def("uninitialised", [](Address shared, Address local) {
    go<uninitialised_kernel>("uninitialised", 1, 1, 4, at<float>(shared), at<float>(local));
  });
  m.def("reverse", [](int threads, Address x, Address y) {
    go<reverse_kernel>("reverse", 1, threads, threads * 4, at<const float>(x), at<float>(y));
  });
  m.def("early_exit", [] { go<early_exit_kernel>("early_exit", 1, 64, 0); });
  m.def("diverged_barrier", [] { go<diverged_barrier_kernel>("diverged_barrier", 1, 64, 0); });
  m.def("diverged_warp", [](Address y) {
    go<diverged_warp_kernel>("diverged_warp", 1, 32, 0, at<int>(y));
  });
  m.def("named_barriers", [](Address y) {
    go<named_barriers_kernel>("named_barriers", 1, 128, 512, at<float>(y));
  });
  m.def("warp_barrier", [](Address y) {
    go<warp_barrier_kernel>("warp_barrier", 1, 64, 256, at<float>(y));
  });
  m.def("shuffles", [](Address y) { go<shuffles_kernel>("shuffles", 1, 32, 0, at<int>(y)); });
  m.def("copy", [](int threads, Address x, Address y, int tiles, int valid) {
    go<copy_kernel>("copy", 1, threads, threads * 32, at<const float>(x), at<float>(y), tiles, valid);
  });
  m.def("product", [](bool is_bf16, Address a, Address b, bool b_is_transposed, Address d) {
    if (is_bf16)
      go<product_kernel<bf16>>("product", 1, 32, 768, at<const bf16>(a), at<const bf16>(b),
         b_is_transposed, at<float>(d));
    else
      go<product_kernel<f16>>("product", 1, 32, 768, at<const f16>(a), at<const f16>(b),
         b_is_transposed, at<float>(d));
  });
  m.def("transpose", [](Address x, Address y) {
    go<transpose_kernel>("transpose", 1, 32, 512, at<const uint16_t>(x), at<uint16_t>(y));
  });
  m.def("round", [](bool is_bf16, Address x, Address y, Address back, int count) {
    if (is_bf16)
      go<round_kernel<bf16>>("round", 1, 64, 0, at<const float>(x), at<bf16>(y), at<float>(back),
         count);
    else
      go<round_kernel<f16>>("round", 1, 64, 0, at<const float>(x), at<f16>(y), at<float>(back),
         count);
  });
  m.def("exp2", [](int threads, Address x, Address y) {
    go<exp2_kernel>("exp2", 1, threads, 0, at<const float>(x), at<float>(y));
  });
  m.def("deferred", [](int threads, Address jobs, Address seen) {
    go<deferred_kernel>("deferred", 1, threads, 0, at<unsigned>(jobs), at<unsigned>(seen));
  });
}

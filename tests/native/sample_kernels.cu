// Kernels that use what csrc/cuda/resources.py is to find: a spill, static shared memory, the matrix
// and copy instructions of both architectures. Compiled and read by test_cuda_resources.py; they
// compute nothing and are never launched.
namespace llama2rt {
namespace {

__global__ void __launch_bounds__(1024) spilling_kernel(const float* x, float* y) {
  float held[128], sum = 0;
#pragma unroll
  for (int i = 0; i < 128; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i)
#pragma unroll
    for (int j = i; j < 128; j += 17) sum += held[i] * held[j];
  y[threadIdx.x] = sum;
}

template <int SIZE>
__global__ void shared_kernel(const int4* x, int4* y) {
  __shared__ int4 held[SIZE];
  held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = held[threadIdx.x ^ 1];
}

__global__ void __launch_bounds__(128) matrix_kernel(const void* x, unsigned* y, long map) {
  extern __shared__ char memory[];
  const unsigned to = (unsigned)__cvta_generic_to_shared(memory);
  unsigned c[4] = {};
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%2}], [%3];" ::"r"(to), "l"(map), "r"(0), "r"(to + 1024) : "memory");
  float sum[4] = {};
  asm volatile("wgmma.fence.sync.aligned;\n"
               "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %4, 1, 1,"
               " 1, 0, 0;\n"
               "wgmma.commit_group.sync.aligned;\n"
               "wgmma.wait_group.sync.aligned 0;"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "l"(map) : "memory");
  c[0] = __float_as_uint(sum[0] + sum[1] + sum[2] + sum[3]);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x) : "memory");
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
               " {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(threadIdx.x));
#endif
  y[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}

}  // namespace

void use(int4* p) {
  spilling_kernel<<<1, 1024>>>((float*)p, (float*)p);
  shared_kernel<256><<<1, 256>>>(p, p);
  matrix_kernel<<<1, 128, 2048>>>(p, (unsigned*)p, 0);
}

}  // namespace llama2rt

// The C++ interface of the CUDA kernels: one plain struct of arguments per op. Pointers are device
// addresses of elements of `dtype` unless typed; strides count elements; the last dimension is
// contiguous everywhere. Functions launch on `stream` and return; errors are std::runtime_error.
#pragma once

#include <stdint.h>

namespace llama2rt {

enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct RmsNorm {
  DType dtype;
  int64_t rows, columns;
  const void* x;
  int64_t x_stride;
  const void* weight;
  float eps;
  void* y;      // contiguous
  float* rstd;  // [rows]
  int device;
  uintptr_t stream;
};

struct RmsNormBackward {
  DType dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_stride;
  const void* x;
  int64_t x_stride;
  const void* weight;
  const float* rstd;
  void *dx, *dweight;
  float* partial;  // scratch, [blocks, columns]
  int64_t blocks;  // thread blocks the rows are shared among; at least 1
  int device;
  uintptr_t stream;
};

void rms_norm(const RmsNorm&);
void rms_norm_backward(const RmsNormBackward&);

}  // namespace llama2rt

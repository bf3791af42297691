// The C++ interface of the CUDA kernels: one plain struct of arguments per op. Pointers are device
// addresses of elements of `dtype` unless typed; strides count elements; the last dimension is
// contiguous everywhere. Functions launch on `stream` and return; errors are std::runtime_error.
#pragma once

#include <stdint.h>

namespace llama2rt {

enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// With a residual, the norm is that of x + residual, which is written to `summed` as well.
struct RmsNorm {
  DType dtype;
  int64_t rows, columns;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const void* weight;
  float eps;
  void* y;       // contiguous
  void* summed;  // contiguous; null without a residual
  float* rstd;   // [rows]
  int device;
  uintptr_t stream;
};

struct RmsNormBackward {
  DType dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_stride;
  const void* dsummed;  // added to dx; or null
  int64_t dsummed_stride;
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

struct SwiGlu {
  DType dtype;
  int64_t rows, columns;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* y;         // contiguous
  int64_t blocks;  // thread blocks that share the work, at most; at least 1
  int device;
  uintptr_t stream;
};

struct SwiGluBackward {
  DType dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void *dgate, *dup;  // contiguous
  int64_t blocks;
  int device;
  uintptr_t stream;
};

// One of the two tensors that rope turns.
struct RopeHeads {
  const void* x;  // [tokens, heads, dim]
  int64_t heads, token_stride, head_stride;
  void* y;  // contiguous
};

// A position outside the tables gives NaN for its token.
struct Rope {
  DType dtype;
  int64_t tokens, dim;
  RopeHeads q, k;
  const float *cos, *sin;  // [table_rows, dim / 2]
  int64_t table_rows;
  const void* positions;  // [tokens], int64 or int32
  bool wide_positions;
  bool inverse;  // by the opposite angle: the gradient
  int64_t blocks;
  int device;
  uintptr_t stream;
};

void rms_norm(const RmsNorm&);
void rms_norm_backward(const RmsNormBackward&);
void swiglu(const SwiGlu&);
void swiglu_backward(const SwiGluBackward&);
void rope(const Rope&);

}  // namespace llama2rt

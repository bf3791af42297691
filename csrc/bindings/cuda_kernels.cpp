// Python bindings of the CUDA kernels: addresses, strides and the stream's handle as integers,
// nothing of torch. llama2rt/ops/cuda_kernels is the only caller.
#include "cuda_kernels.h"

#include "../cuda/ops.h"

namespace py = pybind11;

namespace llama2rt {
namespace {

template <typename T = const void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm",
        [](int dtype, int64_t rows, int64_t columns, Address x, int64_t x_stride, Address residual,
           int64_t residual_stride, Address weight, float eps, Address y, Address summed,
           Address rstd, int device, uintptr_t stream) {
          rms_norm({DType(dtype), rows, columns, at(x), x_stride, at(residual), residual_stride,
                    at(weight), eps, at<void>(y), at<void>(summed), at<float>(rstd), device,
                    stream});
        },
        Release());

  m.def("rms_norm_backward",
        [](int dtype, int64_t rows, int64_t columns, Address dy, int64_t dy_stride, Address dsummed,
           int64_t dsummed_stride, Address x, int64_t x_stride, Address weight, Address rstd,
           Address dx, Address dweight, Address partial, int64_t blocks, int device,
           uintptr_t stream) {
          rms_norm_backward({DType(dtype), rows, columns, at(dy), dy_stride, at(dsummed),
                             dsummed_stride, at(x), x_stride, at(weight), at<const float>(rstd),
                             at<void>(dx), at<void>(dweight), at<float>(partial), blocks, device,
                             stream});
        },
        Release());
}

void bind_swiglu(py::module_& m) {
  m.def("swiglu",
        [](int dtype, int64_t rows, int64_t columns, Address gate, int64_t gate_stride, Address up,
           int64_t up_stride, Address y, int64_t blocks, int device, uintptr_t stream) {
          swiglu({DType(dtype), rows, columns, at(gate), gate_stride, at(up), up_stride,
                  at<void>(y), blocks, device, stream});
        },
        Release());

  m.def("swiglu_backward",
        [](int dtype, int64_t rows, int64_t columns, Address dy, int64_t dy_stride, Address gate,
           int64_t gate_stride, Address up, int64_t up_stride, Address dgate, Address dup,
           int64_t blocks, int device, uintptr_t stream) {
          swiglu_backward({DType(dtype), rows, columns, at(dy), dy_stride, at(gate), gate_stride,
                           at(up), up_stride, at<void>(dgate), at<void>(dup), blocks, device,
                           stream});
        },
        Release());
}

void bind_rope(py::module_& m) {
  m.def("rope",
        [](int dtype, int64_t tokens, int64_t dim, Address q, int64_t q_heads,
           int64_t q_token_stride, int64_t q_head_stride, Address q_out, Address k, int64_t k_heads,
           int64_t k_token_stride, int64_t k_head_stride, Address k_out, Address cos, Address sin,
           int64_t table_rows, Address positions, bool wide_positions, bool inverse, int64_t blocks,
           int device, uintptr_t stream) {
          rope({DType(dtype), tokens, dim,
                {at(q), q_heads, q_token_stride, q_head_stride, at<void>(q_out)},
                {at(k), k_heads, k_token_stride, k_head_stride, at<void>(k_out)},
                at<const float>(cos), at<const float>(sin), table_rows, at(positions),
                wide_positions, inverse, blocks, device, stream});
        },
        Release());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("KERNELS") =
      py::make_tuple("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope");
  bind_rms_norm(m);
  bind_swiglu(m);
  bind_rope(m);
}

}  // namespace llama2rt

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
        [](int dtype, int64_t rows, int64_t columns, Address x, int64_t x_stride, Address weight,
           float eps, Address y, Address rstd, int device, uintptr_t stream) {
          rms_norm({DType(dtype), rows, columns, at(x), x_stride, at(weight), eps, at<void>(y),
                    at<float>(rstd), device, stream});
        },
        Release());

  m.def("rms_norm_backward",
        [](int dtype, int64_t rows, int64_t columns, Address dy, int64_t dy_stride, Address x,
           int64_t x_stride, Address weight, Address rstd, Address dx, Address dweight,
           Address partial, int64_t blocks, int device, uintptr_t stream) {
          rms_norm_backward({DType(dtype), rows, columns, at(dy), dy_stride, at(x), x_stride,
                             at(weight), at<const float>(rstd), at<void>(dx), at<void>(dweight),
                             at<float>(partial), blocks, device, stream});
        },
        Release());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("KERNELS") = py::make_tuple("rms_norm", "rms_norm_backward");
  bind_rms_norm(m);
}

}  // namespace llama2rt

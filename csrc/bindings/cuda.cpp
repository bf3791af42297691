// Python bindings of the CUDA kernels: addresses, strides and the stream's handle as integers,
// nothing of torch. llama2rt/ops/cuda.py is the only caller. Importing this needs no driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "../cuda/ops.h"

namespace py = pybind11;
using namespace llama2rt;

namespace {

template <typename T = const void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels over raw device addresses; use llama2rt.ops.";

  m.attr("KERNELS") = py::make_tuple("rms_norm", "rms_norm_backward");
  m.attr("ARCHITECTURES") = LLAMA2RT_CUDA_ARCHITECTURES;
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.def("driver_version", [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }, "CUDA version of the installed driver as 1000 * major + 10 * minor; 0 without a driver.");

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

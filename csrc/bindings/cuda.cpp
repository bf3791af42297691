// The module `_cuda`. Importing it needs no driver.
#include <cuda_runtime_api.h>

#include "cuda_kernels.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels over raw device addresses; use llama2rt.ops.";
  llama2rt::bind_kernels(m);
  m.attr("ARCHITECTURES") = LLAMA2RT_CUDA_ARCHITECTURES;
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.def("driver_version", [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }, "CUDA version of the installed driver as 1000 * major + 10 * minor; 0 without a driver.");
}

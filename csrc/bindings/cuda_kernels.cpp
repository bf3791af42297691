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

void bind_attention_sm90(py::module_& m) {
  m.def("attention_sm90",
        [](int dtype, int64_t documents, Address q_offsets, Address k_offsets, bool q_offsets_64,
           bool k_offsets_64, int64_t tokens, int64_t keys, int64_t heads, int64_t kv_heads,
           int64_t head_dim, Address q, int64_t q_token, int64_t q_head, Address k, int64_t k_token,
           int64_t k_head, Address v, int64_t v_token, int64_t v_head, bool causal, float scale,
           int64_t k_section, Address out, Address lse, int device, uintptr_t stream) {
          Attention a{};
          a.dtype = DType(dtype);
          a.documents = documents;
          a.q_offsets = at(q_offsets), a.k_offsets = at(k_offsets);
          a.q_offsets_64 = q_offsets_64, a.k_offsets_64 = k_offsets_64;
          a.tokens = tokens, a.keys = keys;
          a.heads = heads, a.kv_heads = kv_heads, a.head_dim = head_dim;
          a.q = {at(q), q_token, q_head};
          a.k = {at(k), k_token, k_head};
          a.v = {at(v), v_token, v_head};
          a.causal = causal, a.scale = scale, a.k_section = k_section;
          a.out = at<void>(out), a.lse = at<float>(lse);
          a.device = device, a.stream = stream;
          attention_sm90(a);
        },
        Release());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("KERNELS") = py::make_tuple("rms_norm", "rms_norm_backward", "attention_sm90");
  bind_rms_norm(m);
  bind_attention_sm90(m);
}

}  // namespace llama2rt

// Python bindings of the CUDA kernels: addresses, strides and the stream's handle as integers,
// nothing of torch. llama2rt/ops/cuda_kernels is the only caller.
#include "cuda_kernels.h"

#include <tuple>

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

using Heads = std::tuple<Address, int64_t, int64_t>;       // address, token and head stride
using Offsets = std::tuple<Address, bool>;                 // address, whether of int64
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

Attention::Heads heads_at(const Heads& x) {
  return {at(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}

Attention attention_arguments(int dtype, const Sizes& sizes, const Offsets& q_offsets,
                              const Offsets& k_offsets, const Heads& q, const Heads& k,
                              const Heads& v, bool causal, float scale, int64_t k_section,
                              int64_t q_section, Address out, Address lse, int device,
                              uintptr_t stream) {
  const auto [documents, tokens, keys, heads, kv_heads, head_dim] = sizes;
  return {DType(dtype), documents, at(std::get<0>(q_offsets)), at(std::get<0>(k_offsets)),
          std::get<1>(q_offsets), std::get<1>(k_offsets), tokens, keys, heads, kv_heads, head_dim,
          heads_at(q), heads_at(k), heads_at(v), causal, scale, k_section, q_section,
          at<void>(out), at<float>(lse), device, stream};
}

void bind_attention(py::module_& m) {
  m.def("attention",
        [](int dtype, Sizes sizes, Offsets q_offsets, Offsets k_offsets, Heads q, Heads k, Heads v,
           bool causal, float scale, int64_t k_section, int64_t q_section, Address out, Address lse,
           int device, uintptr_t stream) {
          attention(attention_arguments(dtype, sizes, q_offsets, k_offsets, q, k, v, causal, scale,
                                        k_section, q_section, out, lse, device, stream));
        },
        Release());

  m.def("attention_backward",
        [](int dtype, Sizes sizes, Offsets q_offsets, Offsets k_offsets, Heads q, Heads k, Heads v,
           bool causal, float scale, int64_t k_section, int64_t q_section, Address out, Address lse,
           int device, uintptr_t stream, Heads dout, Address delta, Address dq, Address dk,
           Address dv) {
          attention_backward(
              {attention_arguments(dtype, sizes, q_offsets, k_offsets, q, k, v, causal, scale,
                                   k_section, q_section, out, lse, device, stream),
               heads_at(dout), at<void>(dq), at<void>(dk), at<void>(dv), at<float>(delta)});
        },
        Release());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("KERNELS") = py::make_tuple("rms_norm", "rms_norm_backward", "attention",
                                     "attention_backward");
  bind_rms_norm(m);
  bind_attention(m);
}

}  // namespace llama2rt

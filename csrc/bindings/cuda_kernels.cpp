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

using Strided = std::tuple<Address, int64_t, int64_t>;                // strides but the last, 1
using PagedCache = std::tuple<Address, int64_t, int64_t, int64_t>;
using Indices = std::tuple<Address, bool>;                            // whether of int64

void bind_decode_attention(py::module_& m) {
  using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, uint32_t>;
  m.def("decode_attention",
        [](int dtype, const Sizes& sizes, const Strided& q, const PagedCache& k,
           const PagedCache& v, const Indices& block_table, int64_t block_table_stride,
           const Indices& lengths, float scale, uint32_t splits, Address out, Address partial,
           Address lse, int device, uintptr_t stream) {
          const auto [sequences, heads, kv_heads, head_dim, page_size] = sizes;
          const auto [q_at, q_sequence_stride, q_head_stride] = q;
          const auto [k_at, k_page_stride, k_token_stride, k_head_stride] = k;
          const auto [v_at, v_page_stride, v_token_stride, v_head_stride] = v;
          const auto [block_table_at, block_table_64] = block_table;
          const auto [lengths_at, lengths_64] = lengths;
          decode_attention({DType(dtype), sequences, heads, kv_heads, head_dim, at(q_at),
                            q_sequence_stride, q_head_stride, at(k_at), at(v_at), k_page_stride,
                            k_token_stride, k_head_stride, v_page_stride, v_token_stride,
                            v_head_stride, page_size, at(block_table_at), block_table_64,
                            block_table_stride, at(lengths_at), lengths_64, scale, splits,
                            at<void>(out), at<float>(partial), at<float>(lse), device, stream});
        },
        Release());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("KERNELS") = py::make_tuple("rms_norm", "rms_norm_backward", "decode_attention");
  bind_rms_norm(m);
  bind_decode_attention(m);
}

}  // namespace llama2rt

// Python bindings of the CUDA kernels: addresses, strides and the stream's handle as integers,
// nothing of torch. llama2rt/ops/cuda_kernels is the only caller.
#include "cuda_kernels.h"

#include <tuple>

#include "../cuda/ops.h"
#include "../cuda/shared_bytes.h"

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
  const auto forward = [&](const char* name, void (*function)(const Attention&)) {
    m.def(name,
          [function](int dtype, Sizes sizes, Offsets q_offsets, Offsets k_offsets, Heads q, Heads k,
                     Heads v, bool causal, float scale, int64_t k_section, int64_t q_section,
                     Address out, Address lse, int device, uintptr_t stream) {
            function(attention_arguments(dtype, sizes, q_offsets, k_offsets, q, k, v, causal, scale,
                                         k_section, q_section, out, lse, device, stream));
          },
          Release());
  };
  forward("attention", attention);
  forward("attention_sm90", attention_sm90);

  const auto backward = [&](const char* name, void (*function)(const AttentionBackward&)) {
    m.def(name,
          [function](int dtype, Sizes sizes, Offsets q_offsets, Offsets k_offsets, Heads q, Heads k,
                     Heads v, bool causal, float scale, int64_t k_section, int64_t q_section,
                     Address out, Address lse, int device, uintptr_t stream, Heads dout,
                     Address delta, Address dq, Address dk, Address dv) {
            function({attention_arguments(dtype, sizes, q_offsets, k_offsets, q, k, v, causal,
                                          scale, k_section, q_section, out, lse, device, stream),
                      heads_at(dout), at<void>(dq), at<void>(dk), at<void>(dv), at<float>(delta)});
          },
          Release());
  };
  backward("attention_backward", attention_backward);
  backward("attention_sm90_backward", attention_sm90_backward);
}

void bind_decode_attention(py::module_& m) {
  using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, uint32_t>;
  using Paged = std::tuple<Address, int64_t, int64_t, int64_t>;  // page, token and head stride
  m.def("decode_attention",
        [](int dtype, const Sizes& sizes, const Heads& q, const Paged& k,
           const Paged& v, const Offsets& block_table, int64_t block_table_stride,
           const Offsets& lengths, float scale, uint32_t splits, Address out, Address partial,
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

void bind_token_logprob(py::module_& m) {
  m.def("token_logprob",
        [](int dtype, int64_t rows, int64_t columns, Address logits, int64_t stride,
           Address targets, int64_t first, float scale, Address peak, Address total,
           Address weighted, Address chosen, int device, uintptr_t stream) {
          token_logprob({DType(dtype), rows, columns, at(logits), stride,
                         at<const int64_t>(targets), first, scale, at<float>(peak),
                         at<float>(total), at<float>(weighted), at<float>(chosen), device,
                         stream});
        },
        Release());

  m.def("token_logprob_backward",
        [](int dtype, int64_t rows, int64_t columns, Address logits, int64_t stride,
           Address dlogits, int64_t dlogits_stride, Address targets, int64_t first, float scale,
           Address lse, Address dlogprob, Address dentropy, Address entropy, int device,
           uintptr_t stream) {
          token_logprob_backward({DType(dtype), rows, columns, at(logits), stride,
                                  at<void>(dlogits), dlogits_stride,
                                  at<const int64_t>(targets), first, scale, at<const float>(lse),
                                  at<const float>(dlogprob), at<const float>(dentropy),
                                  at<const float>(entropy), device, stream});
        },
        Release());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("KERNELS") =
      py::make_tuple("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope",
                     "attention", "attention_backward", "attention_sm90", "attention_sm90_backward",
                     "decode_attention", "token_logprob", "token_logprob_backward");
  bind_rms_norm(m);
  bind_swiglu(m);
  bind_rope(m);
  bind_attention(m);
  bind_decode_attention(m);
  bind_token_logprob(m);
  m.def("most_shared_bytes", [] {
    py::list kernels;
    for (const ListedKernel* at = ListedKernel::first; at; at = at->next)
      kernels.append(py::make_tuple(at->name, at->most_shared_bytes));
    return kernels;
  }, "[(mangled name, bytes)] of every launch: the most dynamic shared memory that it asks for.");
}

}  // namespace llama2rt

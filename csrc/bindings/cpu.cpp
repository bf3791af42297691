// Python bindings of the CPU kernels: addresses, sizes and strides as integers, nothing of torch.
// llama2rt/ops/cpu.py is the only caller and keeps every tensor alive until the call returns.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "../cpu/ops.h"

namespace py = pybind11;
using namespace llama2rt;

namespace {

template <typename T = const void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;
using Heads = std::tuple<Address, int64_t, int64_t>;  // address, token stride, head stride

Attention::Heads heads_at(const Heads& x) {
  return {at(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}

Attention attention_arguments(int dtype, int64_t documents, Address q_offsets, Address k_offsets,
                              int64_t heads, int64_t kv_heads, int64_t head_dim, const Heads& q,
                              const Heads& k, const Heads& v, bool causal, float scale, Address out,
                              Address lse, int threads) {
  return {DType(dtype), documents, at<const int64_t>(q_offsets), at<const int64_t>(k_offsets),
          heads, kv_heads, head_dim, heads_at(q), heads_at(k), heads_at(v), causal, scale,
          at<void>(out), at<float>(lse), threads};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels over raw addresses; use llama2rt.ops.";

  m.attr("KERNELS") = py::make_tuple("rms_norm", "rms_norm_backward", "add_rms_norm",
                                     "add_rms_norm_backward", "swiglu", "swiglu_backward", "rope",
                                     "rope_backward", "attention", "attention_backward",
                                     "decode_attention", "token_logprob",
                                     "token_logprob_backward");
  m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  m.def("instruction_sets", [] {
    py::list names;
    for (const char* const* isa = instruction_sets; *isa; ++isa)
      if (find_kernels(*isa)) names.append(*isa);
    return py::tuple(names);
  }, "Instruction sets built that this processor has, narrowest first.");
  m.def("select", [](const std::string& isa) {
    const Kernels* table = find_kernels(isa.c_str());
    if (!table) throw py::value_error("instruction set '" + isa + "' is not usable here");
    select_kernels(*table);
  }, py::arg("isa"), "Use this instruction set from now on, in every thread.");

  m.def("has_amx", has_amx, "Whether the processor multiplies tiles of bf16 (AMX).");

  m.def("stream_from", stream_from, py::arg("bytes"),
        "Elementwise ops write results past the caches where they move more than these bytes, at "
        "first 32 MiB. Numbers are the same. Returns the former limit.");

  m.def("rms_norm",
        [](int dtype, int64_t rows, int64_t columns, Address x, int64_t x_stride, Address residual,
           int64_t residual_stride, Address weight, float eps, Address y, Address summed,
           Address rstd, int threads) {
          kernels().rms_norm({DType(dtype), rows, columns, at(x), x_stride, at(residual),
                              residual_stride, at(weight), eps, at<void>(y), at<void>(summed),
                              at<float>(rstd), threads});
        },
        Release());

  m.def("rms_norm_backward",
        [](int dtype, int64_t rows, int64_t columns, Address dy, int64_t dy_stride, Address dsummed,
           int64_t dsummed_stride, Address x, int64_t x_stride, Address weight, Address rstd,
           Address dx, Address dweight, int threads) {
          kernels().rms_norm_backward({DType(dtype), rows, columns, at(dy), dy_stride, at(dsummed),
                                       dsummed_stride, at(x), x_stride, at(weight),
                                       at<const float>(rstd), at<void>(dx), at<void>(dweight),
                                       threads});
        },
        Release());

  m.def("swiglu",
        [](int dtype, int64_t rows, int64_t columns, Address gate, int64_t gate_stride, Address up,
           int64_t up_stride, Address y, int threads) {
          kernels().swiglu({DType(dtype), rows, columns, at(gate), gate_stride, at(up), up_stride,
                            at<void>(y), threads});
        },
        Release());

  m.def("swiglu_backward",
        [](int dtype, int64_t rows, int64_t columns, Address dy, int64_t dy_stride, Address gate,
           int64_t gate_stride, Address up, int64_t up_stride, Address dgate, Address dup,
           int threads) {
          kernels().swiglu_backward({DType(dtype), rows, columns, at(dy), dy_stride, at(gate),
                                     gate_stride, at(up), up_stride, at<void>(dgate), at<void>(dup),
                                     threads});
        },
        Release());

  m.def("rope",
        [](int dtype, int64_t tokens, int64_t head_dim, Address q, int64_t q_heads,
           int64_t q_token_stride, int64_t q_head_stride, Address q_out, Address k, int64_t k_heads,
           int64_t k_token_stride, int64_t k_head_stride, Address k_out, Address cos, Address sin,
           int64_t table_rows, Address positions, bool positions_are_int64, bool inverse,
           int threads) {
          kernels().rope({DType(dtype), tokens, head_dim,
                          {at(q), q_heads, q_token_stride, q_head_stride, at<void>(q_out)},
                          {at(k), k_heads, k_token_stride, k_head_stride, at<void>(k_out)},
                          at<const float>(cos), at<const float>(sin), table_rows, at(positions),
                          positions_are_int64, inverse, threads});
        },
        Release());

  m.def("attention",
        [](int dtype, int64_t documents, Address q_offsets, Address k_offsets, int64_t heads,
           int64_t kv_heads, int64_t head_dim, Heads q, Heads k, Heads v, bool causal, float scale,
           Address out, Address lse, int threads) {
          kernels().attention(attention_arguments(dtype, documents, q_offsets, k_offsets, heads,
                                                  kv_heads, head_dim, q, k, v, causal, scale, out,
                                                  lse, threads));
        },
        Release());

  m.def("attention_backward",
        [](int dtype, int64_t documents, Address q_offsets, Address k_offsets, int64_t heads,
           int64_t kv_heads, int64_t head_dim, Heads q, Heads k, Heads v, bool causal, float scale,
           Address out, Address lse, int threads, Heads dout, Address dq, Address dk, Address dv) {
          kernels().attention_backward(
              {attention_arguments(dtype, documents, q_offsets, k_offsets, heads, kv_heads,
                                   head_dim, q, k, v, causal, scale, out, lse, threads),
               heads_at(dout), at<void>(dq), at<void>(dk), at<void>(dv)});
        },
        Release());

  m.def("decode_attention",
        [](int dtype, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim,
           Address q, int64_t q_sequence_stride, int64_t q_head_stride, Address k_cache,
           int64_t k_page_stride, int64_t k_token_stride, int64_t k_head_stride, Address v_cache,
           int64_t v_page_stride, int64_t v_token_stride, int64_t v_head_stride, int64_t pages,
           int64_t page_size, Address block_table, int64_t block_table_columns,
           int64_t block_table_stride, Address lengths, float scale, Address out, int threads) {
          kernels().decode_attention(
              {DType(dtype), sequences, heads, kv_heads, head_dim, at(q), q_sequence_stride,
               q_head_stride, at(k_cache), at(v_cache), k_page_stride, k_token_stride,
               k_head_stride, v_page_stride, v_token_stride, v_head_stride, pages, page_size,
               at<const int32_t>(block_table), block_table_columns, block_table_stride,
               at<const int32_t>(lengths), scale, at<void>(out), threads});
        },
        Release());

  m.def("token_logprob",
        [](int dtype, int64_t rows, int64_t columns, Address logits, int64_t stride,
           Address targets, int64_t first, float scale, Address peak, Address total,
           Address weighted, Address chosen, int threads) {
          kernels().token_logprob({DType(dtype), rows, columns, at(logits), stride,
                                   at<const int64_t>(targets), first, scale, at<float>(peak),
                                   at<float>(total), at<float>(weighted), at<float>(chosen),
                                   threads});
        },
        Release());

  m.def("token_logprob_backward",
        [](int dtype, int64_t rows, int64_t columns, Address logits, int64_t stride,
           Address dlogits, int64_t dlogits_stride, Address targets, int64_t first, float scale,
           Address lse, Address dlogprob, Address dentropy, Address entropy, int threads) {
          kernels().token_logprob_backward(
              {DType(dtype), rows, columns, at(logits), stride, at<void>(dlogits), dlogits_stride,
               at<const int64_t>(targets), first, scale, at<const float>(lse),
               at<const float>(dlogprob), at<const float>(dentropy), at<const float>(entropy),
               threads});
        },
        Release());

  m.def("linear",
        [](int dtype, int64_t rows, int64_t columns, int64_t inner, Address x, int64_t x_stride,
           Address weight, int64_t weight_stride, Address y, int threads) {
          kernels().linear({DType(dtype), rows, columns, inner, at(x), x_stride, at(weight),
                            weight_stride, at<void>(y), threads});
        },
        Release());

  m.def("weight_gradient",
        [](int dtype, int64_t rows, int64_t columns, int64_t inner, Address dy, int64_t dy_stride,
           Address x, int64_t x_stride, Address dweight, Address total, int threads) {
          kernels().weight_gradient({DType(dtype), rows, columns, inner, at(dy), dy_stride, at(x),
                                     x_stride, at<void>(dweight), at<float>(total), threads});
        },
        Release());

  m.def("add_to",
        [](int dtype, int64_t items, Address x, Address total, int threads) {
          kernels().add_to({DType(dtype), items, at(x), at<float>(total), threads});
        },
        Release());
}

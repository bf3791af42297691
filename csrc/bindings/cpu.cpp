// Python bindings of the CPU kernels. llama2rt/ops/cpu_kernels is the only caller.
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/ops.h"
#include "arguments.h"
#include "packed.h"

namespace py = pybind11;
using namespace llama2rt;

namespace {

// Binds an op: its arguments, then how many threads it may use.
template <typename Op, typename... Args>
void bind(py::module_& m, const char* name, Op (*describe)(Args...),
          void (*Kernels::*run)(const Op&)) {
  m.def(name, [=](Args... args, int threads) {
    Op op = describe(args...);
    op.threads = threads;
    (kernels().*run)(op);
  }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels on torch tensors; use llama2rt.ops.";

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

  bind(m, "rms_norm", arguments::rms_norm, &Kernels::rms_norm);
  bind(m, "rms_norm_backward", arguments::rms_norm_backward,
       &Kernels::rms_norm_backward);
  bind(m, "swiglu", arguments::swiglu, &Kernels::swiglu);
  bind(m, "swiglu_backward", arguments::swiglu_backward, &Kernels::swiglu_backward);
  bind(m, "rope", arguments::rope, &Kernels::rope);
  bind(m, "attention", arguments::attention, &Kernels::attention);
  bind(m, "attention_backward", arguments::attention_backward,
       &Kernels::attention_backward);
  bind(m, "decode_attention", arguments::decode_attention,
       &Kernels::decode_attention);
  bind(m, "token_logprob", arguments::token_logprob, &Kernels::token_logprob);
  bind(m, "token_logprob_backward", arguments::token_logprob_backward,
       &Kernels::token_logprob_backward);
  bind(m, "linear", arguments::linear, &Kernels::linear);
  bind(m, "blocked_linear", arguments::blocked_linear, &Kernels::blocked_linear);
  bind(m, "weight_gradient", arguments::weight_gradient, &Kernels::weight_gradient);
  bind(m, "add_to", arguments::add_to, &Kernels::add_to);
  bind(m, "sample", arguments::sample, &Kernels::sample);
  bind_packed(m);
  bind(m, "pack_weight", arguments::pack_weight, &Kernels::pack_weight);
  bind(m, "packed_linear", arguments::packed_linear, &Kernels::packed_linear);
}

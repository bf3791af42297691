// Python bindings of the CUDA kernels. llama2rt/ops/cuda_kernels is the only caller.
#include "cuda_kernels.h"

#include "../cuda/ops.h"
#include "../cuda/shared_bytes.h"
#include "arguments.h"

namespace py = pybind11;

namespace llama2rt {
namespace {

// Binds an op: its arguments, then what `add` puts into the op beside them, then where it runs:
// (device, the handle of a stream).
template <typename Op, typename... Args, typename... More>
void bind(py::module_& m, const char* name, Op (*describe)(Args...), void (*add)(Op&, More...),
          void (*run)(const Op&)) {
  m.def(name, [=](Args... args, More... more, int device, uintptr_t stream) {
    Op op = describe(args...);
    add(op, more...);
    op.device = device, op.stream = stream;
    run(op);
  }, py::call_guard<py::gil_scoped_release>());
}

// ---- What an op needs on CUDA beside its arguments: scratch memory and the shape of its grid ----

template <typename Op>
void nothing(Op&) {}

template <typename Op>
void blocks(Op& op, int64_t blocks) {
  op.blocks = blocks;
}

void partial_sums(RmsNormBackward& op, const Tensor& partial) {
  op.partial = partial.floats(), op.blocks = partial.size(0);
}

void sections(Attention& op, int64_t k_section, int64_t q_section) {
  op.k_section = k_section, op.q_section = q_section;
}

void sections_and_delta(AttentionBackward& op, int64_t k_section, int64_t q_section,
                        const Tensor& delta) {
  sections(op, k_section, q_section);
  op.delta = delta.floats();
}

void splits(DecodeAttention& op, uint32_t splits, const Optional& partial, const Optional& lse) {
  op.splits = splits, op.partial = partial.floats(), op.lse = lse.floats();
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.attr("KERNELS") =
      py::make_tuple("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope",
                     "attention", "attention_backward", "attention_sm90", "attention_sm90_backward",
                     "decode_attention", "token_logprob", "token_logprob_backward");
  namespace of = arguments;
  bind(m, "rms_norm", of::rms_norm, nothing<RmsNorm>, rms_norm);
  bind(m, "rms_norm_backward", of::rms_norm_backward, partial_sums, rms_norm_backward);
  bind(m, "swiglu", of::swiglu, blocks<SwiGlu>, swiglu);
  bind(m, "swiglu_backward", of::swiglu_backward, blocks<SwiGluBackward>, swiglu_backward);
  bind(m, "rope", of::rope, blocks<Rope>, rope);
  bind(m, "attention", of::attention, sections, attention);
  bind(m, "attention_sm90", of::attention, sections, attention_sm90);
  bind(m, "attention_backward", of::attention_backward, sections_and_delta, attention_backward);
  bind(m, "attention_sm90_backward", of::attention_backward, sections_and_delta,
       attention_sm90_backward);
  bind(m, "decode_attention", of::decode_attention, splits, decode_attention);
  bind(m, "token_logprob", of::token_logprob, nothing<TokenLogprob>, token_logprob);
  bind(m, "token_logprob_backward", of::token_logprob_backward, nothing<TokenLogprobBackward>,
       token_logprob_backward);
  m.def("most_shared_bytes", [] {
    py::list kernels;
    for (const ListedKernel* at = ListedKernel::first; at; at = at->next)
      kernels.append(py::make_tuple(at->name, at->most_shared_bytes));
    return kernels;
  }, "[(mangled name, bytes)] of every launch: the most dynamic shared memory that it asks for.");
}

}  // namespace llama2rt

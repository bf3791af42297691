// The CPU kernels: the table of functions that each instruction set fills, one for each op of
// ../ops.h, and the choice among the tables.
#pragma once

#include "../ops.h"

namespace llama2rt {

struct Kernels {
  const char* isa;
  void (*rms_norm)(const RmsNorm&);
  void (*rms_norm_backward)(const RmsNormBackward&);
  void (*swiglu)(const SwiGlu&);
  void (*swiglu_backward)(const SwiGluBackward&);
  void (*rope)(const Rope&);
  void (*attention)(const Attention&);
  void (*attention_backward)(const AttentionBackward&);
  void (*decode_attention)(const DecodeAttention&);
  void (*token_logprob)(const TokenLogprob&);
  void (*token_logprob_backward)(const TokenLogprobBackward&);
  void (*add_to)(const AddTo&);
  void (*linear)(const Linear&);
  void (*blocked_linear)(const BlockedLinear&);
  void (*weight_gradient)(const WeightGradient&);
  void (*pack_weight)(const PackWeight&);
  void (*packed_linear)(const PackedLinear&);
  void (*forward_pass)(const ForwardPass&);
  void (*sample)(const Sample&);
};

// The table in use: the widest instruction set of this processor unless another was selected.
const Kernels& kernels();
// Null if this processor or this build has no such instruction set; otherwise its table.
const Kernels* find_kernels(const char* isa);
void select_kernels(const Kernels& table);
// Names of all instruction sets built, narrowest first, ending with null.
extern const char* const instruction_sets[];
// Whether the processor has units that multiply whole tiles of bf16 (AMX), which only libraries use.
bool has_amx();
// An op that moves more bytes than this writes its results past the caches.
int64_t streamed_from();
int64_t stream_from(int64_t bytes);  // returns the former limit
// Throws std::invalid_argument, a ValueError in Python, where an index would leave its array.
void require(bool condition, const char* message);

}  // namespace llama2rt

#if defined(LLAMA2RT_ISA)
namespace LLAMA2RT_ISA {
using namespace llama2rt;
void rms_norm(const RmsNorm&);
void rms_norm_backward(const RmsNormBackward&);
void swiglu(const SwiGlu&);
void swiglu_backward(const SwiGluBackward&);
void rope(const Rope&);
void attention(const Attention&);
void attention_backward(const AttentionBackward&);
void decode_attention(const DecodeAttention&);
void token_logprob(const TokenLogprob&);
void token_logprob_backward(const TokenLogprobBackward&);
void add_to(const AddTo&);
void linear(const Linear&);
void blocked_linear(const BlockedLinear&);
void weight_gradient(const WeightGradient&);
void pack_weight(const PackWeight&);
void packed_linear(const PackedLinear&);
void forward_pass(const ForwardPass&);
void sample(const Sample&);
}  // namespace LLAMA2RT_ISA
#endif

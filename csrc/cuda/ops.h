// The CUDA kernels, one function for each op of ../ops.h: they launch on the op's stream and return;
// errors are std::runtime_error.
#pragma once

#include "../ops.h"

namespace llama2rt {

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

// Attention on compute capability 9.0, from a build for 90a: bf16 or fp16, head_dim 64 or 128, at
// least one query and one key; strides multiples of 16 bytes, a token's heads inside its stride.
void attention_sm90(const Attention&);
void attention_sm90_backward(const AttentionBackward&);

}  // namespace llama2rt

// From the tensors of a call to the struct of its op (../ops.h): the one list of an op's arguments,
// for `_cpu` and `_cuda`. llama2rt/ops/cpu_kernels and cuda_kernels call in this order, with
// arguments that have passed the checks of llama2rt/ops/contract.
#pragma once

#include "tensor.h"

namespace llama2rt::arguments {

inline RmsNorm rms_norm(const Tensor& x, const Optional& residual, const Tensor& weight, float eps,
                        const Tensor& y, const Optional& summed, const Tensor& rstd) {
  RmsNorm a{};
  a.dtype = x.dtype();
  a.rows = x.size(0), a.columns = x.size(1);
  a.x = x.matrix(), a.residual = residual.matrix();
  a.weight = weight.data(), a.eps = eps;
  a.y = y.data(), a.summed = summed.data(), a.rstd = rstd.floats();
  return a;
}

inline RmsNormBackward rms_norm_backward(const Tensor& dy, const Optional& dsummed, const Tensor& x,
                                         const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                                         const Tensor& dweight) {
  RmsNormBackward a{};
  a.dtype = x.dtype();
  a.rows = x.size(0), a.columns = x.size(1);
  a.dy = dy.matrix(), a.dsummed = dsummed.matrix(), a.x = x.matrix();
  a.weight = weight.data(), a.rstd = rstd.floats();
  a.dx = dx.data(), a.dweight = dweight.data();
  return a;
}

inline SwiGlu swiglu(const Tensor& gate, const Tensor& up, const Tensor& y) {
  SwiGlu a{};
  a.dtype = gate.dtype();
  a.rows = gate.size(0), a.columns = gate.size(1);
  a.gate = gate.matrix(), a.up = up.matrix();
  a.y = y.data();
  return a;
}

inline SwiGluBackward swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                      const Tensor& dgate, const Tensor& dup) {
  SwiGluBackward a{};
  a.dtype = gate.dtype();
  a.rows = gate.size(0), a.columns = gate.size(1);
  a.dy = dy.matrix(), a.gate = gate.matrix(), a.up = up.matrix();
  a.dgate = dgate.data(), a.dup = dup.data();
  return a;
}

inline Rope rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                 const Tensor& positions, bool inverse, const Tensor& q_out, const Tensor& k_out) {
  Rope a{};
  a.dtype = q.dtype();
  a.tokens = q.size(0), a.head_dim = q.size(2);
  a.q = {q.heads(), q.size(1), q_out.data()};
  a.k = {k.heads(), k.size(1), k_out.data()};
  a.cos = cos.floats(), a.sin = sin.floats(), a.table_rows = cos.size(0);
  a.positions = positions.indices();
  a.inverse = inverse;
  return a;
}

inline Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                           const Tensor& cu_k, bool causal, float scale, const Tensor& out,
                           const Tensor& lse) {
  Attention a{};
  a.dtype = q.dtype();
  a.documents = cu_q.size(0) - 1;
  a.q_offsets = cu_q.indices(), a.k_offsets = cu_k.indices();
  a.tokens = q.size(0), a.keys = k.size(0);
  a.heads = q.size(1), a.kv_heads = k.size(1), a.head_dim = q.size(2);
  a.q = q.heads(), a.k = k.heads(), a.v = v.heads();
  a.causal = causal, a.scale = scale;
  a.out = out.data(), a.lse = lse.floats();
  return a;
}

inline AttentionBackward attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& cu_q, const Tensor& cu_k, bool causal,
                                            float scale, const Tensor& dq, const Tensor& dk,
                                            const Tensor& dv) {
  AttentionBackward b{};
  static_cast<Attention&>(b) = attention(q, k, v, cu_q, cu_k, causal, scale, out, lse);
  b.dout = dout.heads();
  b.dq = dq.data(), b.dk = dk.data(), b.dv = dv.data();
  return b;
}

inline DecodeAttention decode_attention(const Tensor& q, const Tensor& k_cache,
                                        const Tensor& v_cache, const Tensor& block_table,
                                        const Tensor& lengths, float scale, const Optional& cu_q,
                                        const Tensor& out) {
  DecodeAttention a{};
  a.dtype = q.dtype();
  a.sequences = block_table.size(0), a.heads = q.size(1), a.head_dim = q.size(2);
  a.kv_heads = k_cache.size(2);
  a.tokens = q.size(0), a.q_offsets = cu_q.data() ? cu_q.indices() : Indices{nullptr, false};
  a.q = q.heads(), a.k_cache = k_cache.pages(), a.v_cache = v_cache.pages();
  a.pages = k_cache.size(0), a.page_size = k_cache.size(1);
  a.block_table = block_table.indices();
  a.block_table_columns = block_table.size(1), a.block_table_stride = block_table.stride(0);
  a.lengths = lengths.indices();
  a.scale = scale, a.out = out.data();
  return a;
}

inline const int64_t* targets_of(const Tensor& targets) {
  if (!targets.is_int64()) throw std::invalid_argument("targets are int64");
  return static_cast<const int64_t*>(targets.data());
}

inline TokenLogprob token_logprob(const Tensor& logits, const Tensor& targets, int64_t first,
                                  float scale, const Tensor& row_max, const Tensor& row_sum,
                                  const Optional& weighted_sum, const Tensor& target_logit) {
  TokenLogprob a{};
  a.dtype = logits.dtype();
  a.rows = logits.size(0), a.columns = logits.size(1);
  a.logits = logits.matrix(), a.targets = targets_of(targets);
  a.first = first, a.scale = scale;
  a.row_max = row_max.floats(), a.row_sum = row_sum.floats();
  a.weighted_sum = weighted_sum.floats(), a.target_logit = target_logit.floats();
  return a;
}

inline TokenLogprobBackward token_logprob_backward(const Tensor& logits, const Tensor& dlogits,
                                                   const Tensor& targets, int64_t first,
                                                   float scale, const Tensor& lse,
                                                   const Tensor& dlogprob, const Optional& dentropy,
                                                   const Optional& entropy) {
  TokenLogprobBackward a{};
  a.dtype = logits.dtype();
  a.rows = logits.size(0), a.columns = logits.size(1);
  a.logits = logits.matrix();
  a.dlogits = dlogits.data(), a.dlogits_stride = dlogits.stride(0);
  a.targets = targets_of(targets), a.first = first, a.scale = scale;
  a.lse = lse.floats(), a.dlogprob = dlogprob.floats();
  a.dentropy = dentropy.floats(), a.entropy = entropy.floats();
  return a;
}

inline Linear linear(const Tensor& x, const Tensor& weight, const Tensor& y) {
  Linear a{};
  a.dtype = x.dtype();
  a.rows = x.size(0), a.columns = weight.size(0), a.inner = x.size(1);
  a.x = x.matrix(), a.weight = weight.matrix();
  a.y = y.data();
  return a;
}

inline BlockedLinear blocked_linear(const Tensor& x, const Tensor& weight, bool transposed,
                                    const Tensor& y) {
  BlockedLinear a{};
  static_cast<Linear&>(a) = linear(x, weight, y);
  a.columns = weight.size(transposed ? 1 : 0);
  a.transposed = transposed;
  return a;
}

inline WeightGradient weight_gradient(const Tensor& dy, const Tensor& x, const Optional& dweight,
                                      const Optional& sum) {
  WeightGradient a{};
  a.dtype = x.dtype();
  a.rows = dy.size(0), a.columns = dy.size(1), a.inner = x.size(1);
  a.dy = dy.matrix(), a.x = x.matrix();
  a.dweight = dweight.data(), a.sum = sum.floats();
  return a;
}

inline AddTo add_to(const Tensor& x, const Tensor& sum) {
  AddTo a{};
  a.dtype = x.dtype();
  a.items = x.items();
  a.x = x.data(), a.sum = sum.floats();
  return a;
}

inline PackWeight pack_weight(const Tensor& first, const Optional& second, const Optional& third,
                              bool transposed, const PackedWeight& to) {
  PackWeight a{};
  a.dtype = first.dtype();
  a.transposed = transposed;
  a.parts[0] = {first.matrix(), first.size(0)};
  if (second.of.data) a.parts[1] = {second.matrix(), second.size(0)};
  if (third.of.data) a.parts[2] = {third.matrix(), third.size(0)};
  a.to = to;
  return a;
}

inline PackedLinear packed_linear(const Tensor& x, const PackedWeight& weight, const Tensor& y) {
  PackedLinear a{};
  a.dtype = x.dtype();
  a.rows = x.size(0);
  a.x = x.matrix(), a.weight = weight;
  a.y = y.data(), a.y_stride = y.stride(0);
  a.y_is_fp32 = y.dtype() == DType::fp32;
  return a;
}

inline Sample sample(const Tensor& logits, const Tensor& temperatures, const Tensor& uniform,
                     const Tensor& tokens, const Tensor& logprobs) {
  Sample a{};
  a.rows = logits.size(0), a.columns = logits.size(1);
  a.logits = logits.floats(), a.logits_stride = logits.stride(0);
  if (!uniform.is(dlpack::FLOAT, 64)) throw std::invalid_argument("uniform numbers are float64");
  if (!tokens.is_int64()) throw std::invalid_argument("tokens are int64");
  a.temperatures = temperatures.floats(), a.uniform = static_cast<const double*>(uniform.data());
  a.tokens = static_cast<int64_t*>(tokens.data()), a.logprobs = logprobs.floats();
  return a;
}

}  // namespace llama2rt::arguments

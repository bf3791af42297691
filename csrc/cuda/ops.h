// The C++ interface of the CUDA kernels: one plain struct of arguments per op. Pointers are device
// addresses of elements of `dtype` unless typed; strides count elements; the last dimension is
// contiguous everywhere. Functions launch on `stream` and return; errors are std::runtime_error.
#pragma once

#include <stdint.h>

namespace llama2rt {

enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// With a residual, the norm is that of x + residual, which is written to `summed` as well.
struct RmsNorm {
  DType dtype;
  int64_t rows, columns;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const void* weight;
  float eps;
  void* y;       // contiguous
  void* summed;  // contiguous; null without a residual
  float* rstd;   // [rows]
  int device;
  uintptr_t stream;
};

struct RmsNormBackward {
  DType dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_stride;
  const void* dsummed;  // added to dx; or null
  int64_t dsummed_stride;
  const void* x;
  int64_t x_stride;
  const void* weight;
  const float* rstd;
  void *dx, *dweight;
  float* partial;  // scratch, [blocks, columns]
  int64_t blocks;  // thread blocks the rows are shared among; at least 1
  int device;
  uintptr_t stream;
};

struct SwiGlu {
  DType dtype;
  int64_t rows, columns;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* y;         // contiguous
  int64_t blocks;  // thread blocks that share the work, at most; at least 1
  int device;
  uintptr_t stream;
};

struct SwiGluBackward {
  DType dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void *dgate, *dup;  // contiguous
  int64_t blocks;
  int device;
  uintptr_t stream;
};

// One of the two tensors that rope turns.
struct RopeHeads {
  const void* x;  // [tokens, heads, dim]
  int64_t heads, token_stride, head_stride;
  void* y;  // contiguous
};

// A position outside the tables gives NaN for its token.
struct Rope {
  DType dtype;
  int64_t tokens, dim;
  RopeHeads q, k;
  const float *cos, *sin;  // [table_rows, dim / 2]
  int64_t table_rows;
  const void* positions;  // [tokens], int64 or int32
  bool wide_positions;
  bool inverse;  // by the opposite angle: the gradient
  int64_t blocks;
  int device;
  uintptr_t stream;
};

// Query heads h * group ... (h + 1) * group - 1 read key head h, with group = heads / kv_heads.
struct Attention {
  struct Heads {  // [tokens, heads, head_dim]
    const void* data;
    int64_t token_stride, head_stride;
  };
  DType dtype;
  int64_t documents;
  const void *q_offsets, *k_offsets;  // [documents + 1], rising from 0
  bool q_offsets_64, k_offsets_64;    // int64_t, else int32_t
  int64_t tokens, keys;               // rows of q, and of k and v
  int64_t heads, kv_heads, head_dim;  // head_dim a multiple of 8 and at most 256
  Heads q, k, v;                      // rows aligned to 16 bytes
  bool causal;
  float scale;        // forward: above 0
  int64_t k_section;  // key heads whose keys, or whose queries, one section of the grid reads:
  int64_t q_section;  // what the L2 cache can keep
  void* out;          // [tokens, heads, head_dim], contiguous
  float* lse;         // [heads, tokens]: log of the sum of exp(score) over a query's keys
  int device;
  uintptr_t stream;
};

struct AttentionBackward {
  Attention forward;  // its `out` and `lse` are read
  Attention::Heads dout;
  void *dq, *dk, *dv;  // contiguous
  float* delta;        // scratch, [heads, tokens]
};

// Query heads h * group ... (h + 1) * group - 1 read key head h, with group = heads / kv_heads.
struct DecodeAttention {
  DType dtype;
  int64_t sequences, heads, kv_heads, head_dim;  // head_dim at most 256
  const void* q;  // [sequences, heads, head_dim]
  int64_t q_sequence_stride, q_head_stride;
  const void *k_cache, *v_cache;  // [pages, page_size, kv_heads, head_dim]
  int64_t k_page_stride, k_token_stride, k_head_stride;
  int64_t v_page_stride, v_token_stride, v_head_stride;
  uint32_t page_size;
  const void* block_table;  // [sequences, ...]; entries past a sequence's end are not read
  bool block_table_64;      // int64_t, else int32_t
  int64_t block_table_stride;
  const void* lengths;  // [sequences], below 2^31
  bool lengths_64;
  float scale;            // above 0
  uint32_t splits;        // of each context; at least 1
  void* out;              // [sequences, heads, head_dim], contiguous
  float *partial, *lse;   // scratch, [splits, sequences, heads, head_dim] and without head_dim; none
                          // with one split
  int device;
  uintptr_t stream;
};

struct TokenLogprob {  // one tile: columns [first, first + columns) of the vocabulary
  DType dtype;
  int64_t rows, columns;
  const void* logits;
  int64_t stride;          // rows are aligned to 16 bytes
  const int64_t* targets;  // per row; another tile's or a negative one changes nothing
  int64_t first;
  float scale;  // of the logits: 1 / temperature
  // Per row, over the tiles so far, with x = (logit - peak) * scale:
  float* peak;      // largest logit
  float* total;     // sum of exp(x)
  float* weighted;  // sum of exp(x) * x; null: no entropy is wanted
  float* chosen;    // logit of the target
  int device;
  uintptr_t stream;
};

struct TokenLogprobBackward {
  DType dtype;
  int64_t rows, columns;
  const void* logits;
  int64_t stride;
  void* dlogits;  // may be the logits themselves
  int64_t dlogits_stride;
  const int64_t* targets;
  int64_t first;
  float scale;
  const float *lse, *dlogprob;
  const float *dentropy, *entropy;  // null: no gradient arrives through the entropy
  int device;
  uintptr_t stream;
};

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

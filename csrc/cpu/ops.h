// The C++ interface of the CPU kernels: one plain struct of arguments per op, and the table of
// functions that each instruction set fills. Pointers are to elements of `dtype` unless typed;
// strides count elements; the last dimension is contiguous everywhere.
#pragma once

#include <stdint.h>

namespace llama2rt {

enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct RmsNorm {
  DType dtype;
  int64_t rows, columns;
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: plain RMSNorm, nothing is added and `summed` is not written
  int64_t residual_stride;
  const void* weight;
  float eps;
  void *y, *summed;
  float* rstd;
  int threads;
};

struct RmsNormBackward {
  DType dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_stride;
  const void* dsummed;  // null: no gradient arrives through the sum
  int64_t dsummed_stride;
  const void* x;
  int64_t x_stride;
  const void* weight;
  const float* rstd;
  void *dx, *dweight;
  int threads;
};

struct Swiglu {
  DType dtype;
  int64_t rows, columns;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* y;
  int threads;
};

struct SwigluBackward {
  DType dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void *dgate, *dup;
  int threads;
};

struct Rope {
  struct Heads {  // q or k: [tokens, heads, head_dim]
    const void* x;
    int64_t heads, token_stride, head_stride;
    void* out;  // contiguous
  };
  DType dtype;
  int64_t tokens, head_dim;
  Heads q, k;
  const float *cos, *sin;  // [table_rows, head_dim / 2], contiguous
  int64_t table_rows;
  const void* positions;  // [tokens], contiguous; each in [0, table_rows)
  bool positions_are_int64;
  bool inverse;  // rotate back: the gradient
  int threads;
};

struct Attention {
  struct Heads {  // [tokens, heads, head_dim]
    const void* data;
    int64_t token_stride, head_stride;
  };
  DType dtype;
  int64_t documents;
  const int64_t *q_offsets, *k_offsets;  // [documents + 1], rising from 0
  int64_t heads, kv_heads, head_dim;
  Heads q, k, v;
  bool causal;
  float scale;
  void* out;   // [tokens, heads, head_dim], contiguous
  float* lse;  // [heads, tokens], contiguous: log of the sum of exp(score) over a query's keys
  int threads;
};

struct AttentionBackward {
  Attention forward;  // its `out` and `lse` are read
  Attention::Heads dout;
  void *dq, *dk, *dv;  // contiguous
};

struct DecodeAttention {
  DType dtype;
  int64_t sequences, heads, kv_heads, head_dim;
  const void* q;  // [sequences, heads, head_dim]
  int64_t q_sequence_stride, q_head_stride;
  const void *k_cache, *v_cache;  // [pages, page_size, kv_heads, head_dim]
  int64_t k_page_stride, k_token_stride, k_head_stride;
  int64_t v_page_stride, v_token_stride, v_head_stride;
  int64_t pages, page_size;
  const int32_t* block_table;  // [sequences, block_table_columns] page numbers
  int64_t block_table_columns, block_table_stride;
  const int32_t* lengths;  // [sequences] cached tokens; 0 gives a zero row
  float scale;
  void* out;  // [sequences, heads, head_dim], contiguous
  int threads;
};

struct TokenLogprob {  // one tile: columns [first, first + columns) of the vocabulary
  DType dtype;
  int64_t rows, columns;
  const void* logits;
  int64_t stride;
  const int64_t* targets;  // per row; another tile's or a negative one changes nothing
  int64_t first;
  float scale;  // of the logits: 1 / temperature
  // Per row, over the tiles so far, with x = (logit - peak) * scale:
  float* peak;      // largest logit
  float* total;     // sum of exp(x)
  float* weighted;  // sum of exp(x) * x; null: no entropy is wanted
  float* chosen;    // logit of the target
  int threads;
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
  int threads;
};

struct Linear {  // y = x weight^T
  DType dtype;
  int64_t rows, columns, inner;
  const void* x;
  int64_t x_stride;
  const void* weight;  // [columns, inner]
  int64_t weight_stride;
  void* y;  // [rows, columns], contiguous
  int threads;
};

struct WeightGradient {  // of that layer: dy^T x
  DType dtype;
  int64_t rows, columns, inner;
  const void* dy;  // [rows, columns]
  int64_t dy_stride;
  const void* x;  // [rows, inner]
  int64_t x_stride;
  void* dweight;  // [columns, inner], contiguous: the result
  float* total;   // alike, fp32: not null where the result is to be added to it instead
  int threads;
};

struct AddTo {  // total += x, both contiguous
  DType dtype;
  int64_t items;
  const void* x;
  float* total;
  int threads;
};

struct Kernels {
  const char* isa;
  void (*rms_norm)(const RmsNorm&);
  void (*rms_norm_backward)(const RmsNormBackward&);
  void (*swiglu)(const Swiglu&);
  void (*swiglu_backward)(const SwigluBackward&);
  void (*rope)(const Rope&);
  void (*attention)(const Attention&);
  void (*attention_backward)(const AttentionBackward&);
  void (*decode_attention)(const DecodeAttention&);
  void (*token_logprob)(const TokenLogprob&);
  void (*token_logprob_backward)(const TokenLogprobBackward&);
  void (*add_to)(const AddTo&);
  void (*linear)(const Linear&);
  void (*weight_gradient)(const WeightGradient&);
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
void swiglu(const Swiglu&);
void swiglu_backward(const SwigluBackward&);
void rope(const Rope&);
void attention(const Attention&);
void attention_backward(const AttentionBackward&);
void decode_attention(const DecodeAttention&);
void token_logprob(const TokenLogprob&);
void token_logprob_backward(const TokenLogprobBackward&);
void add_to(const AddTo&);
void linear(const Linear&);
void weight_gradient(const WeightGradient&);
}  // namespace LLAMA2RT_ISA
#endif

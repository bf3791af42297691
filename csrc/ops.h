// The arguments of each op: one plain struct, filled by the bindings (bindings/arguments.h), read by
// the kernels of the CPU and of CUDA alike. Pointers are to elements of `dtype` unless typed, on CUDA
// device addresses; strides count elements; the last dimension is contiguous everywhere, and what has
// no stride is contiguous whole.
#pragma once

#include <stdint.h>

namespace llama2rt {

enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// Where an op runs: on at most so many CPU threads, or on a stream of a CUDA device.
struct Where {
  int threads;
  int device;
  uintptr_t stream;
};

struct Matrix {  // [rows, columns]; null: there is none
  const void* data;
  int64_t stride;

  explicit operator bool() const { return data != nullptr; }
};

struct Heads {  // [tokens, heads, head_dim]
  const void* data;
  int64_t token_stride, head_stride;
};

struct Pages {  // [pages, page_size, kv_heads, head_dim]
  const void* data;
  int64_t page_stride, token_stride, head_stride;
};

struct Indices {  // int64_t or int32_t
  const void* data;
  bool are_int64;
};

// With a residual, the norm is that of x + residual, which is written to `summed` as well.
struct RmsNorm : Where {
  DType dtype;
  int64_t rows, columns;
  Matrix x, residual;
  const void* weight;
  float eps;
  void *y, *summed;  // summed: null without a residual
  float* rstd;       // [rows]
};

struct RmsNormBackward : Where {
  DType dtype;
  int64_t rows, columns;
  Matrix dy, dsummed, x;  // dsummed is added to dx; null: no gradient arrives through the sum
  const void* weight;
  const float* rstd;
  void *dx, *dweight;
  float* partial;  // CUDA: scratch, [blocks, columns]
  int64_t blocks;  // CUDA: thread blocks the rows are shared among; at least 1
};

struct SwiGlu : Where {
  DType dtype;
  int64_t rows, columns;
  Matrix gate, up;
  void* y;
  int64_t blocks;  // CUDA: thread blocks that share the work, at most; at least 1
};

struct SwiGluBackward : Where {
  DType dtype;
  int64_t rows, columns;
  Matrix dy, gate, up;
  void *dgate, *dup;
  int64_t blocks;  // CUDA: as of SwiGlu
};

// One of the two tensors that rope rotates.
struct RopeHeads {
  Heads x;
  int64_t heads;
  void* y;
};

// A position outside the tables is an error on the CPU; on CUDA it gives NaN for its token.
struct Rope : Where {
  DType dtype;
  int64_t tokens, head_dim;
  RopeHeads q, k;
  const float *cos, *sin;  // [table_rows, head_dim / 2]
  int64_t table_rows;
  Indices positions;  // [tokens]
  bool inverse;       // by the opposite angle: the gradient
  int64_t blocks;     // CUDA: as of SwiGlu
};

// Query heads h * group ... (h + 1) * group - 1 read key head h, with group = heads / kv_heads.
struct Attention : Where {
  DType dtype;
  int64_t documents;
  Indices q_offsets, k_offsets;  // [documents + 1], rising from 0; on the CPU int64_t
  int64_t tokens, keys;          // rows of q, and of k and v
  int64_t heads, kv_heads, head_dim;  // CUDA: head_dim a multiple of 8 and at most 256
  Heads q, k, v;                      // CUDA: rows aligned to 16 bytes
  bool causal;
  float scale;  // CUDA, forward: above 0
  void* out;    // [tokens, heads, head_dim]
  float* lse;   // [heads, tokens]: log of the sum of exp(score) over a query's keys
  // CUDA: key heads whose keys, or whose queries, one section of the grid reads: what the L2 cache
  // can keep.
  int64_t k_section, q_section;
};

struct AttentionBackward : Attention {  // forward's `out` and `lse` are read
  Heads dout;
  void *dq, *dk, *dv;
  float* delta;  // CUDA: scratch, [heads, tokens]
};

struct DecodeAttention : Where {
  DType dtype;
  int64_t sequences, heads, kv_heads, head_dim;  // CUDA: head_dim at most 256
  int64_t tokens;                                // rows of q
  // [sequences + 1], rising from 0; null: each sequence has one query; on the CPU int64_t
  Indices q_offsets;
  Heads q;  // [tokens, heads, head_dim]
  Pages k_cache, v_cache;
  int64_t pages, page_size;
  Indices block_table;  // [sequences, block_table_columns] page numbers; on the CPU int32_t
  int64_t block_table_columns, block_table_stride;  // entries past a sequence's end are not read
  // [sequences] cached tokens, below 2^31, of which a sequence's queries are the last; a query that
  // sees none gives a zero row; CPU: int32_t
  Indices lengths;
  float scale;      // CUDA: above 0
  void* out;        // [tokens, heads, head_dim]
  uint32_t splits;  // CUDA: of each context; at least 1
  // CUDA: scratch, [splits, tokens, heads, head_dim] and without head_dim; none with one split.
  float *partial, *lse;
};

struct TokenLogprob : Where {  // one tile: columns [first, first + columns) of the vocabulary
  DType dtype;
  int64_t rows, columns;
  Matrix logits;           // CUDA: rows aligned to 16 bytes
  const int64_t* targets;  // per row; another tile's or a negative one changes nothing
  int64_t first;
  float scale;  // of the logits: 1 / temperature
  // Per row, over the tiles so far, with x = (logit - row_max) * scale:
  float* row_max;       // largest logit
  float* row_sum;       // sum of exp(x)
  float* weighted_sum;  // sum of exp(x) * x; null: no entropy is wanted
  float* target_logit;
};

struct TokenLogprobBackward : Where {
  DType dtype;
  int64_t rows, columns;
  Matrix logits;
  void* dlogits;  // may be the logits themselves
  int64_t dlogits_stride;
  const int64_t* targets;
  int64_t first;
  float scale;
  const float *lse, *dlogprob;
  const float *dentropy, *entropy;  // null: no gradient arrives through the entropy
};

struct Linear : Where {  // y = x weight^T
  DType dtype;
  int64_t rows, columns, inner;
  Matrix x, weight;  // [rows, inner], [columns, inner]
  void* y;           // [rows, columns]
};

struct BlockedLinear : Linear {
  bool transposed;  // the weight is [inner, columns]: y = x weight
};

struct WeightGradient : Where {  // of that layer: dy^T x
  DType dtype;
  int64_t rows, columns, inner;
  Matrix dy, x;   // [rows, columns], [rows, inner]
  void* dweight;  // [columns, inner]: the result
  float* sum;     // alike, fp32: not null where the result is to be added to it instead
};

struct AddTo : Where {  // sum += x
  DType dtype;
  int64_t items;
  const void* x;
  float* sum;
};

// How the numbers of a packed weight are stored (cpu/panels.h); the first three as DType has them.
enum class Storage : int { fp32 = 0, bf16 = 1, fp16 = 2, int8 = 3 };

struct PackedWeight {  // [columns, inner]
  void* data;
  float* scales;  // of int8 numbers: one a column, to a multiple of 32 columns; otherwise null
  Storage storage;
  int64_t columns, inner;
};

struct WeightPart {  // [columns, inner]
  Matrix weight;
  int64_t columns;
};

struct PackWeight : Where {
  DType dtype;
  WeightPart parts[3];  // one below another, those that there are first
  bool transposed;      // the first, alone, is [inner, columns] as it lies
  PackedWeight to;
};

struct PackedLinear : Where {  // y = x weight^T; the weight in x's dtype or int8
  DType dtype;
  int64_t rows;
  Matrix x;  // [rows, weight.inner]
  PackedWeight weight;
  void* y;  // [rows, weight.columns]
  int64_t y_stride;
  bool y_is_fp32;  // otherwise of x's dtype
};

struct PackedBlock {
  const void *attention_norm, *ffn_norm;  // [dim]
  // Query, key and value one below another; gate and up.
  PackedWeight qkv, attention_output, gate_up, down;
};

struct PackedLlama {
  DType dtype;
  int64_t dim, heads, kv_heads, head_dim, ffn_hidden, vocab_size, layers;
  float eps;
  const void* embedding;  // [vocab_size, dim]
  const PackedBlock* blocks;
  const void* norm;
  PackedWeight output;
  const float *cos, *sin;  // [context, head_dim / 2]
  int64_t context;
};

// One forward pass of a language model: tokens of whole prompts, then the new tokens of sequences that
// have a past in the pages.
struct ForwardPass : Where {
  PackedLlama model;
  int64_t tokens;
  Indices token_ids, positions, slots;  // [tokens]; int64_t token ids and slots
  int64_t prompts;
  Indices prompt_offsets;               // [prompts + 1], int64_t: rows of the prompts' tokens
  int64_t prompt_tokens, sequences;
  Indices q_offsets;  // this and the next four as of DecodeAttention
  Indices block_table;
  int64_t block_table_columns, block_table_stride;
  Indices lengths;
  void *keys, *values;  // [layers, pages, page_size, kv_heads, head_dim]
  int64_t pages, page_size;
  int64_t sampled;
  Indices rows;   // [sampled], int64_t: tokens whose logits are wanted
  float* logits;  // [sampled, vocab_size]
};

struct Sample : Where {
  int64_t rows, columns;
  const float* logits;
  int64_t logits_stride;
  const float* temperatures;  // [rows]; 0 takes the largest logit
  const double* uniform;      // [rows], in (0, 1)
  int64_t* tokens;            // [rows]
  float* logprobs;            // [rows]: at the temperature, at 0 that of temperature 1
};

}  // namespace llama2rt

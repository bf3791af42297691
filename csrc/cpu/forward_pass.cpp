// A forward pass of a whole language model that generates: prompts and decoding sequences together,
// their keys and values in pages, on weights in panels.
//
// The steps are those of model/transformer.py, by the kernels of the ops themselves, and what lies
// between two of them is rounded to the model's dtype as there. Only the logits are not: they are the
// fp32 sums. What is saved is the way from one kernel to the next, which for a token costs more than
// many of the kernels.
#include "panels.h"
#include "parallel.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

// Activations of a pass. What attention needs and what the feed-forward layer needs share memory.
struct Activations {
  Activations(const ForwardPass& a)
      : size(size_of(a.model.dtype)),
        dim(a.model.dim),
        kv_dim(a.model.kv_heads * a.model.head_dim),
        hidden(a.model.ffn_hidden),
        heads_floats(a.tokens * a.model.heads),
        memory(3 * part(a, dim) + shared(a) + floats(a)),
        residual(memory.data),
        x(residual + part(a, dim)),
        normed(x + part(a, dim)),
        qkv(normed + part(a, dim)),
        q(qkv + part(a, dim + 2 * kv_dim)),
        k(q + part(a, dim)),
        gate_up(qkv),
        product(gate_up + part(a, 2 * hidden)),
        rstd((float*)(qkv + shared(a))),
        lse(rstd + round_up(a.tokens, 16)) {}

  int64_t part(const ForwardPass& a, int64_t columns) const {
    return round_up(a.tokens * columns * size, 64);
  }
  int64_t shared(const ForwardPass& a) const {
    const int64_t attention = part(a, dim + 2 * kv_dim) + part(a, dim) + part(a, kv_dim);
    const int64_t feed_forward = part(a, 2 * hidden) + part(a, hidden);
    return attention > feed_forward ? attention : feed_forward;
  }
  int64_t floats(const ForwardPass& a) const {
    return 4 * (round_up(a.tokens, 16) + round_up(heads_floats, 16));
  }

  const int64_t size, dim, kv_dim, hidden, heads_floats;
  Workspace<char> memory;
  char *const residual, *const x, *const normed;  // [tokens, dim]
  char *const qkv, *const q, *const k;            // [tokens, dim + 2 kv_dim], [.., dim], [.., kv_dim]
  char *const gate_up, *const product;            // [tokens, 2 hidden], [.., hidden]
  float *const rstd, *const lse;                  // [tokens], [heads, tokens]
};

void check(const ForwardPass& a) {
  for (int64_t i = 0; i < a.tokens; ++i) {
    const int64_t token = ((const int64_t*)a.token_ids.data)[i];
    require(0 <= token && token < a.model.vocab_size, "tokens: an id is outside the vocabulary");
    const int64_t slot = ((const int64_t*)a.slots.data)[i];
    require(0 <= slot && slot < a.pages * a.page_size, "slots: a value lies outside the caches");
  }
  for (int64_t i = 0; i < a.sampled; ++i) {
    const int64_t row = ((const int64_t*)a.rows.data)[i];
    require(0 <= row && row < a.tokens, "rows: a value is no token of this pass");
    require(i == 0 || ((const int64_t*)a.rows.data)[i - 1] < row, "rows: expected rising values");
  }
}

// y [rows, weight.columns] = x [rows, weight.inner] weight^T
void multiply(const ForwardPass& a, const void* x, int64_t rows, const PackedWeight& weight, void* y,
              bool y_is_fp32 = false) {
  PackedLinear op{};
  op.threads = a.threads, op.dtype = a.model.dtype, op.rows = rows;
  op.x = {x, weight.inner}, op.weight = weight;
  op.y = y, op.y_stride = weight.columns, op.y_is_fp32 = y_is_fp32;
  packed_linear(op);
}

// The norm of x + residual, which becomes the residual; of x alone at the start, where there is none.
void norm(const ForwardPass& a, const Activations& to, int64_t rows, const void* weight, bool start) {
  RmsNorm op{};
  op.threads = a.threads, op.dtype = a.model.dtype;
  op.rows = rows, op.columns = a.model.dim;
  op.x = {start ? to.residual : to.x, a.model.dim};
  if (!start) op.residual = {to.residual, a.model.dim}, op.summed = to.residual;
  op.weight = weight, op.eps = a.model.eps;
  op.y = to.normed, op.rstd = to.rstd;
  rms_norm(op);
}

void rotate(const ForwardPass& a, const Activations& to) {
  const PackedLlama& model = a.model;
  const int64_t width = to.dim + 2 * to.kv_dim;
  Rope op{};
  op.threads = a.threads, op.dtype = model.dtype;
  op.tokens = a.tokens, op.head_dim = model.head_dim;
  op.q = {{to.qkv, width, model.head_dim}, model.heads, to.q};
  op.k = {{to.qkv + to.dim * to.size, width, model.head_dim}, model.kv_heads, to.k};
  op.cos = model.cos, op.sin = model.sin, op.table_rows = model.context;
  op.positions = a.positions;
  rope(op);
}

// The pass's keys and values into their slots of the layer's pages.
void write(const ForwardPass& a, const Activations& from, char* keys, char* values) {
  const int64_t row = from.kv_dim * from.size, width = (from.dim + 2 * from.kv_dim) * from.size;
  for (int64_t i = 0; i < a.tokens; ++i) {
    const int64_t slot = ((const int64_t*)a.slots.data)[i];
    memcpy(keys + slot * row, from.k + i * row, row);
    memcpy(values + slot * row, from.qkv + i * width + (from.dim + from.kv_dim) * from.size, row);
  }
}

// Attention of the prompts, then of the decoding sequences -> normed, [tokens, dim].
void attend(const ForwardPass& a, const Activations& in, char* keys, char* values) {
  const PackedLlama& model = a.model;
  const int64_t n = model.head_dim, width = in.dim + 2 * in.kv_dim;
  const int64_t prompt_tokens = a.prompt_tokens;
  const float scale = 1.0f / sqrtf((float)n);
  if (prompt_tokens > 0) {
    Attention op{};
    op.threads = a.threads, op.dtype = model.dtype;
    op.documents = a.prompts, op.q_offsets = op.k_offsets = a.prompt_offsets;
    op.tokens = op.keys = prompt_tokens;
    op.heads = model.heads, op.kv_heads = model.kv_heads, op.head_dim = n;
    op.q = {in.q, in.dim, n}, op.k = {in.k, in.kv_dim, n};
    op.v = {in.qkv + (in.dim + in.kv_dim) * in.size, width, n};
    op.causal = true, op.scale = scale;
    op.out = in.normed, op.lse = in.lse;
    attention(op);
  }
  if (a.sequences == 0) return;
  DecodeAttention op{};
  op.threads = a.threads, op.dtype = model.dtype;
  op.sequences = a.sequences, op.tokens = a.tokens - prompt_tokens, op.q_offsets = a.q_offsets;
  op.heads = model.heads, op.kv_heads = model.kv_heads, op.head_dim = n;
  op.q = {in.q + prompt_tokens * in.dim * in.size, in.dim, n};
  op.k_cache = {keys, a.page_size * in.kv_dim, in.kv_dim, n};
  op.v_cache = {values, a.page_size * in.kv_dim, in.kv_dim, n};
  op.pages = a.pages, op.page_size = a.page_size;
  op.block_table = a.block_table;
  op.block_table_columns = a.block_table_columns, op.block_table_stride = a.block_table_stride;
  op.lengths = a.lengths, op.scale = scale;
  op.out = in.normed + prompt_tokens * in.dim * in.size;
  decode_attention(op);
}

void run_block(const ForwardPass& a, const Activations& at, int64_t layer) {
  const PackedBlock& block = a.model.blocks[layer];
  const int64_t layer_bytes = a.pages * a.page_size * at.kv_dim * at.size;
  char *keys = (char*)a.keys + layer * layer_bytes, *values = (char*)a.values + layer * layer_bytes;

  norm(a, at, a.tokens, block.attention_norm, layer == 0);
  multiply(a, at.normed, a.tokens, block.qkv, at.qkv);
  rotate(a, at);
  write(a, at, keys, values);
  attend(a, at, keys, values);
  multiply(a, at.normed, a.tokens, block.attention_output, at.x);

  norm(a, at, a.tokens, block.ffn_norm, false);
  multiply(a, at.normed, a.tokens, block.gate_up, at.gate_up);
  SwiGlu op{};
  op.threads = a.threads, op.dtype = a.model.dtype;
  op.rows = a.tokens, op.columns = at.hidden;
  op.gate = {at.gate_up, 2 * at.hidden}, op.up = {at.gate_up + at.hidden * at.size, 2 * at.hidden};
  op.y = at.product;
  swiglu(op);
  multiply(a, at.product, a.tokens, block.down, at.x);
}

// Rows of [tokens, bytes] to the front. They rise, so that none is overwritten before it is moved.
void gather(const ForwardPass& a, char* rows, int64_t bytes) {
  for (int64_t i = 0; i < a.sampled; ++i) {
    const int64_t from = ((const int64_t*)a.rows.data)[i];
    if (from != i) memmove(rows + i * bytes, rows + from * bytes, bytes);
  }
}

}  // namespace

void forward_pass(const ForwardPass& a) {
  if (a.tokens == 0) return;
  check(a);
  const Activations at(a);
  const int64_t row = at.dim * at.size;
  for (int64_t i = 0; i < a.tokens; ++i) {
    const int64_t token = ((const int64_t*)a.token_ids.data)[i];
    memcpy(at.residual + i * row, (const char*)a.model.embedding + token * row, row);
  }
  for (int64_t layer = 0; layer < a.model.layers; ++layer) run_block(a, at, layer);
  if (a.sampled == 0) return;
  gather(a, at.x, row);
  gather(a, at.residual, row);
  norm(a, at, a.sampled, a.model.norm, false);
  multiply(a, at.normed, a.sampled, a.model.output, a.logits, true);
}

}  // namespace LLAMA2RT_ISA

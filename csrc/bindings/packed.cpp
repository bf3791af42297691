// Python bindings of packed weights. llama2rt/ops/packed.py is the only caller, and keeps alive the
// tensors whose addresses are kept here.
#include "packed.h"

#include <pybind11/stl.h>
#include <string.h>

#include <string>
#include <vector>

#include "../cpu/ops.h"
#include "arguments.h"

namespace py = pybind11;

namespace llama2rt {
namespace {

Storage storage_named(const std::string& name) {
  if (name == "fp32") return Storage::fp32;
  if (name == "bf16") return Storage::bf16;
  if (name == "fp16") return Storage::fp16;
  if (name == "int8") return Storage::int8;
  throw py::value_error("storage: expected fp32, bf16, fp16 or int8, got '" + name + "'");
}

// Bytes of a weight in panels of 32 columns (cpu/panels.h).
int64_t packed_bytes(const std::string& storage, int64_t columns, int64_t inner) {
  const int64_t numbers = storage == "int8" ? 4 : storage == "bf16" ? 2 : 1;
  const int64_t lane = storage == "fp16" ? 2 : 4;
  return (columns + 31) / 32 * 32 * ((inner + numbers - 1) / numbers) * lane;
}

PackedWeight packed_weight(const Tensor& data, const Optional& scales, int64_t columns, int64_t inner,
                           const std::string& storage) {
  const PackedWeight weight = {data.data(), scales.floats(), storage_named(storage), columns, inner};
  require(columns > 0 && inner > 0, "a packed weight has at least one column and one row");
  require(data.items() >= packed_bytes(storage, columns, inner), "data: too small");
  const bool is_int8 = weight.storage == Storage::int8;
  require(is_int8 == (scales.of.data != nullptr), "scales: int8 numbers have them, and only they");
  require(!is_int8 || scales.items() >= (columns + 31) / 32 * 32, "scales: too few");
  return weight;
}

// The model, and the list of its blocks.
struct Llama {
  PackedLlama model;
  std::vector<PackedBlock> blocks;
};

void require_shape(const PackedWeight& weight, int64_t columns, int64_t inner, DType dtype) {
  require(weight.columns == columns && weight.inner == inner, "a packed weight has another shape");
  require(weight.storage == Storage::int8 || weight.storage == static_cast<Storage>(dtype),
          "a packed weight is of the model's dtype or int8");
}

Llama make_llama(const Tensor& embedding, const Tensor& norm, const PackedWeight& output,
                 const Tensor& cos, const Tensor& sin, py::tuple heads, float eps) {
  Llama llama{};
  PackedLlama& m = llama.model;
  m.dtype = embedding.dtype();
  m.vocab_size = embedding.size(0), m.dim = embedding.size(1);
  m.heads = heads[0].cast<int64_t>(), m.kv_heads = heads[1].cast<int64_t>();
  m.head_dim = m.dim / m.heads;
  m.eps = eps;
  m.embedding = embedding.data(), m.norm = norm.data(), m.output = output;
  m.cos = cos.floats(), m.sin = sin.floats(), m.context = cos.size(0);
  require(norm.items() == m.dim && norm.dtype() == m.dtype, "norm: another shape or dtype");
  require(2 * cos.size(1) == m.head_dim && sin.items() == cos.items(), "cos, sin: another shape");
  require_shape(output, m.vocab_size, m.dim, m.dtype);
  return llama;
}

void add_block(Llama& llama, const Tensor& attention_norm, const Tensor& ffn_norm,
               const PackedWeight& qkv, const PackedWeight& attention_output,
               const PackedWeight& gate_up, const PackedWeight& down) {
  PackedLlama& m = llama.model;
  const int64_t hidden = down.inner;
  require_shape(qkv, m.dim + 2 * m.kv_heads * m.head_dim, m.dim, m.dtype);
  require_shape(attention_output, m.dim, m.dim, m.dtype);
  require_shape(gate_up, 2 * hidden, m.dim, m.dtype);
  require_shape(down, m.dim, hidden, m.dtype);
  require(m.layers == 0 || hidden == m.ffn_hidden, "blocks are of one shape");
  for (const Tensor* norm : {&attention_norm, &ffn_norm})
    require(norm->items() == m.dim && norm->dtype() == m.dtype, "norm: another shape or dtype");
  m.ffn_hidden = hidden;
  llama.blocks.push_back(
      {attention_norm.data(), ffn_norm.data(), qkv, attention_output, gate_up, down});
  m.layers = static_cast<int64_t>(llama.blocks.size());
}

void require_offsets(const Tensor& offsets) {
  require(offsets.is_int64() && offsets.size(0) > 0, "offsets: expected int64, from 0");
  const int64_t *at = static_cast<const int64_t*>(offsets.data()), count = offsets.size(0);
  require(at[0] == 0, "offsets: expected int64, from 0");
  for (int64_t i = 0; i + 1 < count; ++i)
    require(at[i] <= at[i + 1], "offsets: expected rising values");
}

void forward(const Llama& llama, const Tensor& tokens, const Tensor& positions, const Tensor& slots,
             const Tensor& prompt_offsets, const Optional& q_offsets, const Tensor& block_table,
             const Tensor& lengths,
             const Tensor& keys, const Tensor& values, const Tensor& rows, const Tensor& logits,
             int threads) {
  const PackedLlama& m = llama.model;
  ForwardPass a{};
  a.threads = threads;
  a.model = m, a.model.blocks = llama.blocks.data();
  a.tokens = tokens.size(0);
  a.token_ids = tokens.indices(), a.positions = positions.indices(), a.slots = slots.indices();
  a.prompts = prompt_offsets.size(0) - 1, a.prompt_offsets = prompt_offsets.indices();
  require_offsets(prompt_offsets);
  a.prompt_tokens = static_cast<const int64_t*>(prompt_offsets.data())[a.prompts];
  a.sequences = lengths.size(0), a.lengths = lengths.indices();
  if (q_offsets.of.data) {
    require_offsets(q_offsets);
    a.q_offsets = q_offsets.indices();
  }
  a.block_table = block_table.indices();
  a.block_table_columns = block_table.size(1), a.block_table_stride = block_table.stride(0);
  a.keys = keys.data(), a.values = values.data();
  a.pages = keys.size(1), a.page_size = keys.size(2);
  a.sampled = rows.size(0), a.rows = rows.indices(), a.logits = logits.floats();
  require(a.token_ids.are_int64 && a.slots.are_int64 && a.prompt_offsets.are_int64 &&
              a.rows.are_int64 && !a.block_table.are_int64 && !a.lengths.are_int64,
          "indices: another dtype was expected");
  require(positions.size(0) == a.tokens && slots.size(0) == a.tokens &&
              block_table.size(0) == a.sequences,
          "a forward pass's arrays have different lengths");
  int64_t others = a.sequences;
  if (a.q_offsets.data) {
    require(q_offsets.size(0) == a.sequences + 1, "offsets: expected one more than sequences");
    others = static_cast<const int64_t*>(a.q_offsets.data)[a.sequences];
  }
  require(a.prompt_tokens + others == a.tokens, "offsets: expected to end at the number of tokens");
  for (const Tensor* cache : {&keys, &values})
    require(cache->dtype() == m.dtype && cache->size(0) == m.layers && cache->size(1) == a.pages &&
                cache->size(2) == a.page_size && cache->size(3) == m.kv_heads &&
                cache->size(4) == m.head_dim,
            "keys, values: another shape or dtype");
  require(logits.size(0) >= a.sampled && logits.size(1) == m.vocab_size, "logits: another shape");
  py::gil_scoped_release release;
  kernels().forward_pass(a);
}

// One step of a hash, after FNV-1a (whose prime it is), a word at a time. The rotation brings what a
// product leaves in the high bits back to the low ones.
inline uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x100000001b3u;
  return hash << 29 | hash >> 35;
}

// Of the memory of contiguous tensors, word for word: what differs has another number.
uint64_t fingerprint(const std::vector<Tensor>& tensors, int threads) {
  constexpr int64_t PART = 1 << 20;  // bytes, of a thread at a time
  constexpr int CHAINS = 8;          // a multiplication is not waited for
  uint64_t hash = 0;
  py::gil_scoped_release release;
  for (const Tensor& tensor : tensors) {
    const int64_t bytes = tensor.items() * tensor.of.dtype.bits / 8;
    const int64_t parts = (bytes + PART - 1) / PART;
    std::vector<uint64_t> of_parts(parts);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * PART, end = begin + PART < bytes ? begin + PART : bytes;
      const char* data = static_cast<const char*>(tensor.data());
      uint64_t chains[CHAINS] = {};
      int64_t at = begin;
      for (; at + 8 * CHAINS <= end; at += 8 * CHAINS) {
        uint64_t words[CHAINS];
        memcpy(words, data + at, sizeof words);
        for (int i = 0; i < CHAINS; ++i) chains[i] = mixed(chains[i], words[i]);
      }
      for (; at < end; at += 8) {
        uint64_t word = 0;
        memcpy(&word, data + at, end - at < 8 ? end - at : 8);
        chains[0] = mixed(chains[0], word);
      }
      for (uint64_t chain : chains) of_parts[part] = mixed(of_parts[part], chain);
    }
    for (uint64_t of_part : of_parts) hash = mixed(hash, of_part);
  }
  return hash;
}

}  // namespace

void bind_packed(py::module_& m) {
  m.def("packed_bytes", packed_bytes, py::arg("storage"), py::arg("columns"), py::arg("inner"),
        "Bytes of a weight [columns, inner] in panels.");
  m.def("fingerprint", fingerprint, py::arg("tensors"), py::arg("threads"),
        "A number of contiguous tensors' bits: others have another number.");
  py::class_<PackedWeight>(m, "PackedWeight", "A weight in panels: where it is and its shape.")
      .def(py::init(&packed_weight), py::arg("data"), py::arg("scales"), py::arg("columns"),
           py::arg("inner"), py::arg("storage"))
      .def_readonly("columns", &PackedWeight::columns)
      .def_readonly("inner", &PackedWeight::inner);
  py::class_<Llama>(m, "PackedLlama", "A language model on weights in panels.")
      .def(py::init(&make_llama))
      .def("add_block", add_block)
      .def("forward", forward);
}

}  // namespace llama2rt

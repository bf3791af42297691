// What decode_attention takes from its arguments for each sequence, and sequences of many queries.
//
// There the products count: they are attention's own, over tokens gathered from pages.
#pragma once

#include "attention_forward.h"

namespace LLAMA2RT_ISA {

// Queries of a sequence up to which reading the cache counts; more are worth packing its keys.
constexpr int64_t FEW = 8;

struct Sequence {
  Sequence(const DecodeAttention& a, int64_t i)
      : first(a.q_offsets.data ? offset_at(a.q_offsets, i) : i),
        queries(a.q_offsets.data ? offset_at(a.q_offsets, i + 1) - first : 1),
        length(((const int32_t*)a.lengths.data)[i]),
        pages((const int32_t*)a.block_table.data + i * a.block_table_stride) {}

  bool few() const { return queries <= FEW; }
  // The cached tokens that query i sees; below 1, none.
  int64_t seen(int64_t i) const { return length - queries + 1 + i; }

  const int64_t first, queries, length;
  const int32_t* const pages;
};

// The keys or values of sequences, in pages.
template <typename T>
struct Paged {
  static constexpr bool COPIES = true;

  Tokens<T> tokens(int64_t i, int64_t head, int64_t first, int64_t count, T* copy) const {
    const int32_t* pages = Sequence(a, i).pages;
    int64_t page = first / a.page_size, slot = first % a.page_size;
    auto at = [&] {
      return (const T*)of.data + pages[page] * of.page_stride + slot * of.token_stride +
             head * of.head_stride;
    };
    if (slot + count <= a.page_size) return {at(), of.token_stride};
    for (int64_t t = 0; t < count; ++t) {
      memcpy(copy + t * a.head_dim, at(), a.head_dim * sizeof(T));
      if (++slot < a.page_size) continue;
      slot = 0;
      ++page;
    }
    return {copy, a.head_dim};
  }

  const DecodeAttention& a;
  const Pages of;
};

// Sequences of many queries, as documents of attention.
template <typename T>
void decode_many(const DecodeAttention& a) {
  Workspace<int64_t> k_offsets(a.sequences + 1);
  k_offsets.data[0] = 0;
  for (int64_t i = 0; i < a.sequences; ++i)
    k_offsets.data[i + 1] = k_offsets.data[i] + Sequence(a, i).length;
  Attention as{};
  static_cast<Where&>(as) = a;
  as.documents = a.sequences;
  as.q_offsets = a.q_offsets, as.k_offsets = {k_offsets.data, true};
  as.heads = a.heads, as.kv_heads = a.kv_heads, as.head_dim = a.head_dim;
  as.q = a.q, as.out = a.out;
  as.causal = true, as.scale = a.scale;
  forward<T>(as, Paged<T>{a, a.k_cache}, Paged<T>{a, a.v_cache},
             [](int64_t queries) { return queries > FEW; });
}

}  // namespace LLAMA2RT_ISA

// What attention and its gradient share: which keys a query sees, and how the work is divided.
#pragma once

#include <stdlib.h>

#include "matrix.h"
#include "parallel.h"

namespace LLAMA2RT_ISA {

inline int64_t offset_at(const Indices& offsets, int64_t i) {
  return ((const int64_t*)offsets.data)[i];
}

struct Document {
  Document(const Attention& a, int64_t i)
      : q_begin(offset_at(a.q_offsets, i)),
        queries(offset_at(a.q_offsets, i + 1) - q_begin),
        k_begin(offset_at(a.k_offsets, i)),
        keys(offset_at(a.k_offsets, i + 1) - k_begin),
        causal(a.causal) {}

  // How many keys the query sees: always the first ones of the document. The mask is aligned with
  // the last query and the last key.
  int64_t seen(int64_t query) const {
    const int64_t count = causal ? query + 1 + keys - queries : keys;
    return count < 0 ? 0 : count < keys ? count : keys;
  }
  // The first query that sees the key.
  int64_t first_seeing(int64_t key) const {
    const int64_t query = causal ? key - (keys - queries) : 0;
    return query < 0 ? 0 : query;
  }

  const int64_t q_begin, queries, k_begin, keys;
  const bool causal;
};

template <typename T>
inline const T* head_of(const Heads& x, int64_t token, int64_t head) {
  return (const T*)x.data + token * x.token_stride + head * x.head_stride;
}

// The mask of a panel of queries against rows of keys from `key` on.
struct Mask {
  Mask(const Document& document, int64_t query, int64_t key) {
    // Only differences within a tile matter: clamped, they fit lanes of 32 bits.
    const int64_t limit = 1 << 20;
    first = (document.causal ? query + 1 + document.keys - document.queries : document.keys) - key;
    first = first < -limit ? -limit : first < limit ? first : limit;
    for (int j = 0; j < 2; ++j)
      for (int lane = 0; lane < W; ++lane)
        seen[j][lane] = (int32_t)first + (document.causal ? j * W + lane : 0);
  }
  // Whether any of BLOCK rows from `row` on is hidden from any query.
  bool hides(int64_t row) const { return row + BLOCK > first; }
  i32v shows(int64_t row, int j) const { return seen[j] > (int32_t)row; }

  int64_t first;  // rows that the panel's first query sees
  i32v seen[2];
};

// A range of one document's queries against a range of its keys.
struct WorkItem {
  int64_t document, q_begin, q_end, k_begin, k_end;
  int64_t cost;  // visible pairs of query and key, about
};

inline int by_falling_cost(const void* a, const void* b) {
  const int64_t first = ((const WorkItem*)a)->cost, second = ((const WorkItem*)b)->cost;
  return first < second ? 1 : first > second ? -1 : 0;
}

// Calls body(item, kv_head, scratch) for each item and head, the most expensive items first, with
// `floats` of scratch memory per thread.
template <typename Body>
inline void share(const Attention& a, WorkItem* items, int64_t count, int64_t floats, Body body) {
  int64_t products = 0;
  for (int64_t i = 0; i < count; ++i) products += items[i].cost * a.heads * a.head_dim;
  const int64_t products_per_thread = 1 << 18;  // below this, waking a thread costs more
  const int64_t calls = count * a.kv_heads;
  int64_t threads = products / products_per_thread + 1;
  if (threads > calls) threads = calls;
  if (threads > a.threads) threads = a.threads;
  if (threads < 1) return;
  if (threads > 1) qsort(items, count, sizeof(WorkItem), by_falling_cost);
  share(calls, (int)threads, floats, [&](int64_t call, float* scratch) {
    body(items[call / a.kv_heads], call % a.kv_heads, scratch);
  });
}

}  // namespace LLAMA2RT_ISA

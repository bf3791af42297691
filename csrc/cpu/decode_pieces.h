// How the work of decode_attention on sequences of few queries is divided.
#pragma once

#include "decode_attention.h"

namespace LLAMA2RT_ISA {

constexpr int QUERIES = 4;  // query rows of a step of the kernel
// Tokens of a work item. Longer sequences are divided, whatever the number of threads, so that a few
// long ones of few KV heads still feed them all; a long chain of sums also loses more to rounding.
// Divided alike whether neighbours have the same tokens or not, a query has the same bits in any company.
constexpr int64_t SPLIT = 128;
// Sequences that read a split together, and their rows of all the KV heads that a thread takes at once:
// more would not stay in the first caches beside the tile.
constexpr int64_t MEMBERS = 16, TOGETHER_ROWS = 64;

inline int64_t splits_of(const Sequence& of) {
  return of.length <= SPLIT ? 1 : (of.length + SPLIT - 1) / SPLIT;
}

// Rows of a KV head: its query heads, of one query after the other. Those of several queries are
// filled up to whole steps, so that the rows of a step share their keys.
inline int64_t rows_of(int64_t queries, int64_t group) {
  const int64_t count = queries * group;
  return queries == 1 || count <= 2 ? count : round_up(count, QUERIES);
}

// Whether the sequence and the one before it, one query each, have the same pages from token `first`
// to `last`, which both see.
inline bool same_pages(const DecodeAttention& a, int64_t i, int64_t first, int64_t last) {
  const Sequence one(a, i - 1), other(a, i);
  if (one.queries != 1 || other.queries != 1 || one.length < last || other.length < last) return false;
  const int64_t begin = first / a.page_size, end = (last + a.page_size - 1) / a.page_size;
  return memcmp(one.pages + begin, other.pages + begin, (end - begin) * sizeof(int32_t)) == 0;
}

// KV heads [begin, end) of tokens [first, last) of a sequence, or of several `members` that have them
// in common. Where these are not all of a sequence's tokens, what each row has summed goes to
// partials[sequence], [splits, queries, heads, n + 2]: acc, row_max, row_sum.
struct Piece {
  int64_t sequence, members, begin, end, first, last;
  float* const* partials;

  bool divided() const { return partials[sequence] != nullptr; }
  int64_t queries(const Sequence& of) const { return members > 1 ? members : of.queries; }
  // Of a query and a head.
  float* sums(const DecodeAttention& a, const Sequence& of, int64_t query, int64_t head) const {
    const int64_t split = first / SPLIT, row = members > 1 ? 0 : query;
    float* from = partials[members > 1 ? sequence + query : sequence];
    return from + ((split * of.queries + row) * a.heads + head) * (a.head_dim + 2);
  }
};

// The work of sequences of few queries in pieces, and the memory of their sums.
struct Pieces {
  explicit Pieces(const DecodeAttention& a)
      : a(a), group(a.heads / a.kv_heads), partials(a.sequences), memory(count()), pieces(most_pieces) {
    float* next = memory.data;
    for (int64_t i = 0; i < a.sequences; ++i) {
      partials.data[i] = is_divided(i) ? next : nullptr;
      next += floats_of(i);
    }
    // All KV heads of a split together read memory best; fewer, where a thread would wait for another
    // that has the split of most work.
    int64_t together = a.kv_heads;
    while (together > 1 && most * together * a.threads > pairs * a.kv_heads)
      together = (together + 1) / 2;
    // Up to which sequence a split is read by those before.
    Workspace<int64_t> read(most_splits);
    for (int64_t s = 0; s < most_splits; ++s) read.data[s] = 0;
    for (int64_t i = 0; i < a.sequences; ++i) {
      if (!is_few(i)) continue;
      const Sequence of(a, i);
      for (int64_t s = 0; s < splits_of(of); ++s) {
        if (i < read.data[s]) continue;
        const int64_t first = s * SPLIT, last = s + 1 < splits_of(of) ? first + SPLIT : of.length;
        int64_t members = 1;
        if (is_divided(i) && last == first + SPLIT)
          while (members < MEMBERS && i + members < a.sequences && is_divided(i + members) &&
                 same_pages(a, i + members, first, last))
            ++members;
        read.data[s] = i + members;
        add({i, members, 0, 0, first, last, partials.data}, together);
      }
    }
  }

  bool is_few(int64_t i) const {
    const Sequence of(a, i);
    return of.few() && of.queries > 0;
  }
  bool is_divided(int64_t i) const { return is_few(i) && splits_of(Sequence(a, i)) > 1; }
  int64_t floats_of(int64_t i) const {
    const Sequence of(a, i);
    return is_divided(i) ? splits_of(of) * of.queries * a.heads * (a.head_dim + 2) : 0;
  }

  int64_t count() {
    int64_t floats = 0;
    for (int64_t i = 0; i < a.sequences; ++i) {
      if (!is_few(i)) continue;
      const Sequence of(a, i);
      const int64_t its_most = of.queries * (of.length < SPLIT ? of.length : SPLIT);
      pairs += of.queries * of.length;
      most_pieces += splits_of(of) * a.kv_heads;
      floats += floats_of(i);
      if (its_most > most) most = its_most;
      if (splits_of(of) > most_splits) most_splits = splits_of(of);
    }
    return floats;
  }

  void add(Piece piece, int64_t together) {
    const int64_t rows = rows_of(piece.queries(Sequence(a, piece.sequence)), group);
    if (piece.members > 1 && together * rows > TOGETHER_ROWS)
      together = rows < TOGETHER_ROWS ? TOGETHER_ROWS / rows : 1;
    while (together > 1 && piece.members * SPLIT * together * a.threads > pairs * a.kv_heads)
      together = (together + 1) / 2;
    for (piece.begin = 0; piece.begin < a.kv_heads; piece.begin = piece.end) {
      piece.end = piece.begin + together < a.kv_heads ? piece.begin + together : a.kv_heads;
      pieces.data[items++] = piece;
      if ((piece.end - piece.begin) * rows > most_rows) most_rows = (piece.end - piece.begin) * rows;
    }
  }

  const DecodeAttention& a;
  const int64_t group;
  // Pairs of a query and a cached token, of all and of the split that has most.
  int64_t pairs = 0, most = 0, most_splits = 0, most_pieces = 0;
  int64_t items = 0, most_rows = 0;  // pieces, and the most rows of one
  Workspace<float*> partials;        // [sequences]
  Workspace<> memory;
  Workspace<Piece> pieces;
};

}  // namespace LLAMA2RT_ISA

// Attention over packed documents.
#include "attention_forward.h"

namespace LLAMA2RT_ISA {
namespace {

// The keys or values of packed documents.
template <typename T>
struct Packed {
  static constexpr bool COPIES = false;

  Tokens<T> tokens(int64_t document, int64_t head, int64_t first, int64_t, T*) const {
    return {head_of<T>(of, offset_at(a.k_offsets, document) + first, head), of.token_stride};
  }

  const Attention& a;
  const Heads of;
};

}  // namespace

void attention(const Attention& a) {
  if (a.heads == 0) return;
  by_dtype(a.dtype, [&](auto t) {
    using Cache = Packed<decltype(t)>;
    forward<decltype(t)>(a, Cache{a, a.k}, Cache{a, a.v}, [](int64_t) { return true; });
  });
}

}  // namespace LLAMA2RT_ISA

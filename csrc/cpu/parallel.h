// Work shared among threads, scratch memory, and the choice of a kernel by dtype.
#pragma once

#include <omp.h>
#include <stdint.h>

#include <new>

#include "ops.h"
#include "vec.h"

namespace LLAMA2RT_ISA {

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// At most `threads`, fewer where the elements would not repay waking them.
inline int useful_threads(int64_t items, int64_t elements, int threads) {
  const int64_t elements_per_thread = 8192;
  int64_t useful = elements / elements_per_thread;
  if (useful > items) useful = items;
  if (threads > useful) threads = useful > 1 ? (int)useful : 1;
  return threads;
}

// Other threads see stores past the caches only after this.
inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Calls body(begin, end) for parts of [0, items) on as many threads as are useful. Which thread gets
// which items never changes a result.
template <typename Body>
inline void parallel(int64_t items, int64_t elements, int threads, Body body) {
  threads = useful_threads(items, elements, threads);
  if (threads == 1) {
    if (items > 0) body((int64_t)0, items);
    fence();
    return;
  }
  // Where there is enough to do, in parts of about 2^18 elements for whichever thread is free: nobody
  // waits for a thread that other programs slow down. As many for each thread: one part more would
  // keep all others waiting.
  int64_t parts = round_up(elements >> 18, threads);
  if (parts < threads) parts = threads;
  if (parts > items) parts = items;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic) nowait
    for (int64_t part = 0; part < parts; ++part)
      body(items * part / parts, items * (part + 1) / parts);
    fence();
  }
}

// Whether an op that moves `bytes` writes its results past the caches; they are of rows of
// `row_bytes`, the second may be null. Where the whole does not fit into the caches nothing is lost:
// what was written first is gone before anyone reads it. And memory is spared the reading of lines
// that are then overwritten.
inline bool streamed(int64_t bytes, int64_t row_bytes, const void* result, const void* second) {
  const bool whole_lines = ((uintptr_t)result | (uintptr_t)second | (uintptr_t)row_bytes) % 64 == 0;
  return whole_lines && bytes > streamed_from();
}

// The row to be prefetched beside `row`: 8 KiB on, or the next. The processor's own prefetching ends
// with each page.
inline int64_t row_ahead(int64_t row, int64_t rows, int64_t row_bytes) {
  const int64_t reach = 8192;
  const int64_t next = row + (0 < row_bytes && row_bytes < reach ? reach / row_bytes : 1);
  return next < rows ? next : row;
}

// Uninitialised scratch memory from the start of a cache line.
template <typename T = float>
struct Workspace {
  explicit Workspace(int64_t count) : data((T*)operator new(count * sizeof(T), LINE)) {}
  ~Workspace() { operator delete(data, LINE); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  static constexpr std::align_val_t LINE{64};
  T* const data;
};

// Calls body(item, scratch) for each of [0, items), whichever thread is free, with `floats` of
// scratch memory per thread. Who does what never changes a result.
template <typename Body>
inline void share(int64_t items, int threads, int64_t floats, Body body) {
  const int64_t stride = round_up(floats, 16);  // a cache line: threads do not write to each other's
  Workspace<> scratch(threads * stride);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t item = 0; item < items; ++item)
    body(item, scratch.data + omp_get_thread_num() * stride);
}

template <typename Function>
inline void by_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::fp32: return function(float{});
    case DType::bf16: return function(bf16{});
    case DType::fp16: return function(f16{});
  }
}

}  // namespace LLAMA2RT_ISA

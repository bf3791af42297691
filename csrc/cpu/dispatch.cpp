// Chooses among the instruction sets that were built by what this processor has. Compiled for the
// oldest processor, because it is what runs before anything is known.
#include "ops.h"

#include <string.h>
#if defined(LLAMA2RT_X86)
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>

namespace baseline {
extern const llama2rt::Kernels table;
}
#if defined(LLAMA2RT_X86)
namespace avx2 {
extern const llama2rt::Kernels table;
}
namespace avx512 {
extern const llama2rt::Kernels table;
}
namespace avx512bf16 {
extern const llama2rt::Kernels table;
}
#endif

namespace llama2rt {

#if defined(LLAMA2RT_X86)
const char* const instruction_sets[] = {"baseline", "avx2", "avx512", "avx512bf16", nullptr};
#else
const char* const instruction_sets[] = {"baseline", nullptr};
#endif

const Kernels* find_kernels(const char* isa) {
  if (!strcmp(isa, "baseline")) return &baseline::table;
#if defined(LLAMA2RT_X86)
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  // Every processor with the one has the other.
  bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16") &&
                  __builtin_cpu_supports("avx512vnni");
  if (has_avx2 && !strcmp(isa, "avx2")) return &avx2::table;
  if (has_avx512 && !strcmp(isa, "avx512")) return &avx512::table;
  if (has_bf16 && !strcmp(isa, "avx512bf16")) return &avx512bf16::table;
#endif
  return nullptr;
}

bool has_amx() {
#if defined(LLAMA2RT_X86)
  unsigned a, b, c, d;  // leaf 7, EDX: bit 22 is AMX-BF16
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

// About what the last cache holds near a core. Processors' own answers count the caches of all
// their cores: 384 MB where a core reaches 32.
static std::atomic<int64_t> streamed_bytes{(int64_t)32 << 20};
int64_t streamed_from() { return streamed_bytes.load(std::memory_order_relaxed); }
int64_t stream_from(int64_t bytes) { return streamed_bytes.exchange(bytes); }

static const Kernels* widest() {
  const Kernels* best = nullptr;
  for (const char* const* isa = instruction_sets; *isa; ++isa)
    if (const Kernels* table = find_kernels(*isa)) best = table;
  return best;
}

static std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> table{widest()};
  return table;
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }
void select_kernels(const Kernels& table) { selected().store(&table, std::memory_order_relaxed); }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace llama2rt

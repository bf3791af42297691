// Checks every access that a kernel makes. The kernels are compiled with -fsanitize=kernel-address
// in the form that calls a function before each access (CMakeLists.txt); those functions are here,
// and nothing of the compiler's own runtime is linked. A thread may touch its own stack, the shared
// memory that its launch asked for, the buffers that the test handed in, and this module's
// constants. -fsanitize=alignment,bounds,signed-integer-overflow has its checks in the code itself,
// and calls other functions of this file where one fails. This file must be compiled without both.
//
// Left out: calls of memcpy and memset, which compilers take for checked elsewhere.
#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "block.h"

// The module's image, as the linker knows it.
extern "C" {
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace llama2rt::emulator {
namespace {

struct Buffer {
  uintptr_t begin, end;
};
std::vector<Buffer> buffers;  // by address, not overlapping; set between launches only

bool in_buffer(uintptr_t address, size_t bytes) {
  auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                [](uintptr_t a, const Buffer& b) { return a < b.begin; });
  return after != buffers.begin() && address + bytes <= (after - 1)->end;
}

std::string hex(uintptr_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", (size_t)address);
  return text;
}

// Where the address lies, seen from the nearest memory that may be touched.
std::string whereabouts(uintptr_t address) {
  const uintptr_t shared = (uintptr_t)current->shared();
  const size_t shared_bytes = current->launch().shared_bytes;
  if (address - shared < MAX_SHARED_BYTES)
    return "at " + std::to_string(address - shared) + " of " + std::to_string(shared_bytes) +
           " bytes of shared memory";
  const Buffer* nearest = nullptr;
  uintptr_t distance = ~(uintptr_t)0;
  for (const Buffer& b : buffers) {
    const uintptr_t d = address < b.begin ? b.begin - address : address < b.end ? 0 : address - b.end;
    if (d < distance) nearest = &b, distance = d;
  }
  if (!nearest) return "at " + hex(address) + "; no buffer was handed in";
  const std::string size = " a buffer of " + std::to_string(nearest->end - nearest->begin) + " bytes";
  if (address < nearest->begin) return std::to_string(distance) + " bytes before" + size;
  if (address >= nearest->end) return std::to_string(distance) + " bytes after the end of" + size;
  return "at " + std::to_string(address - nearest->begin) + " of" + size;
}

[[noreturn]] void refuse(const char* what, uintptr_t address, size_t bytes) {
  fail(std::string(what) + " of " + std::to_string(bytes) + " bytes " + whereabouts(address));
}

void access(uintptr_t address, size_t bytes, bool writes) {
  Block* block = current;
  if (!block || block->on_own_stack(address)) return;
  if (block->in_shared(address, bytes) || in_buffer(address, bytes)) return;
  if (!writes && address >= (uintptr_t)__ehdr_start && address + bytes <= (uintptr_t)_end) return;
  refuse(writes ? "write" : "read", address, bytes);
}

struct CheckedPlace {
  const char* file;
  uint32_t line, column;
};

void undefined(const char* what, const CheckedPlace& place) {
  const std::string message = what + (" at " + text(Site{place.file, (int)place.line}));
  if (!current) throw std::runtime_error(message);  // in the host's part of a launch
  fail(message);
}

}  // namespace

void set_buffers(const std::vector<std::pair<uintptr_t, size_t>>& handed_in) {
  buffers.clear();
  for (auto [address, bytes] : handed_in)
    if (bytes) buffers.push_back({address, address + bytes});
  std::sort(buffers.begin(), buffers.end(),
            [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  // Views of one tensor overlap: what touches is one buffer.
  size_t kept = 0;
  for (const Buffer& b : buffers)
    if (kept > 0 && b.begin <= buffers[kept - 1].end)
      buffers[kept - 1].end = std::max(buffers[kept - 1].end, b.end);
    else
      buffers[kept++] = b;
  buffers.resize(kept);
}

void check_global(const void* address, size_t bytes, size_t alignment) {
  const auto at = (uintptr_t)address;
  if (!in_buffer(at, bytes)) refuse("access to global memory", at, bytes);
  if (at % alignment) refuse("unaligned access to global memory", at, bytes);
}

void check_shared(const void* address, size_t bytes, size_t alignment) {
  const auto at = (uintptr_t)address;
  if (!current->in_shared(at, bytes)) refuse("access to shared memory", at, bytes);
  if (at % alignment) refuse("unaligned access to shared memory", at, bytes);
}

}  // namespace llama2rt::emulator

extern "C" {
#define LLAMA2RT_ACCESS(size)                                                \
  void __asan_load##size##_noabort(uintptr_t address) {                      \
    llama2rt::emulator::access(address, size, false);                  \
  }                                                                          \
  void __asan_store##size##_noabort(uintptr_t address) {                     \
    llama2rt::emulator::access(address, size, true);                   \
  }
LLAMA2RT_ACCESS(1)
LLAMA2RT_ACCESS(2)
LLAMA2RT_ACCESS(4)
LLAMA2RT_ACCESS(8)
LLAMA2RT_ACCESS(16)
#undef LLAMA2RT_ACCESS
void __asan_loadN_noabort(uintptr_t address, size_t bytes) {
  llama2rt::emulator::access(address, bytes, false);
}
void __asan_storeN_noabort(uintptr_t address, size_t bytes) {
  llama2rt::emulator::access(address, bytes, true);
}
void __asan_handle_no_return() {}
// Around what a module sets up while it is loaded: shared_bytes.h's list.
void __asan_before_dynamic_init(const char*) {}
void __asan_after_dynamic_init() {}

// What the compiler says of a failed check begins with its place.
#define LLAMA2RT_UNDEFINED(name, what)                                     \
  void __ubsan_handle_##name(const llama2rt::emulator::CheckedPlace* p) {  \
    llama2rt::emulator::undefined(what, *p);                               \
  }
LLAMA2RT_UNDEFINED(type_mismatch_v1, "unaligned access")
LLAMA2RT_UNDEFINED(out_of_bounds, "index outside of an array")
LLAMA2RT_UNDEFINED(add_overflow, "signed overflow")
LLAMA2RT_UNDEFINED(sub_overflow, "signed overflow")
LLAMA2RT_UNDEFINED(mul_overflow, "signed overflow")
LLAMA2RT_UNDEFINED(negate_overflow, "signed overflow")
LLAMA2RT_UNDEFINED(divrem_overflow, "signed overflow")
#undef LLAMA2RT_UNDEFINED
}

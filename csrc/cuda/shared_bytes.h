// The dynamic shared memory that kernels ask for, known without launching any: it is part of a
// launch's type, and each launch that is compiled puts its kernel on a list, which resources.py
// reads. Host code alone, the same on a GPU and on the emulator.
#pragma once

#include <stddef.h>

#include <stdexcept>
#include <string>
#include <typeinfo>

namespace llama2rt {

// What a launch asks for: MOST, or less where it depends on sizes that the compiler does not know.
template <size_t MOST>
struct SharedBytes {
  size_t bytes = MOST;
};

template <auto KERNEL>
struct Named {};  // its type_info spells the kernel with its template arguments

// A place on the list, in static memory: it is made while the module is loaded.
struct ListedKernel {
  const char* name;  // of Named, mangled
  size_t most_shared_bytes;
  const ListedKernel* next;
  static inline const ListedKernel* first = nullptr;

  ListedKernel(const char* name, size_t most) : name(name), most_shared_bytes(most), next(first) {
    first = this;
  }
};

template <auto KERNEL, size_t MOST>
inline const ListedKernel listed_kernel(typeid(Named<KERNEL>).name(), MOST);

// Bytes to launch KERNEL with.
template <auto KERNEL, size_t MOST>
size_t shared_bytes_of(const char* name, SharedBytes<MOST> asked) {
  const ListedKernel& listed = listed_kernel<KERNEL, MOST>;
  if (asked.bytes > listed.most_shared_bytes)
    throw std::runtime_error(std::string(name) + ": expected at most " + std::to_string(MOST) +
                             " bytes of shared memory, got " + std::to_string(asked.bytes));
  return asked.bytes;
}

}  // namespace llama2rt

// Stands in for csrc/cuda/launch.cuh: a kernel runs on this CPU, at once.
#pragma once

#include <cuda_runtime.h>

#include "../cuda/shared_bytes.h"
#include "emulator.h"

namespace llama2rt {

// The block's dynamic shared memory, poisoned before every block. __shared__ itself is not defined
// here, so that an array which would escape this does not compile.
extern LLAMA2RT_EMULATOR_TLS unsigned char* shared_memory;

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

// Until a CUDA thread has its arguments they lie on the stack of the host, where it may not read.
#define LLAMA2RT_UNCHECKED __attribute__((no_sanitize("kernel-address")))

template <auto KERNEL, size_t MOST, typename... Arguments>
void launch(const char* name, dim3 grid, dim3 block, SharedBytes<MOST> shared, cudaStream_t,
            Arguments... arguments) {
  auto body = [&]() LLAMA2RT_UNCHECKED { KERNEL(arguments...); };
  emulator::run({name,
                 {grid.x, grid.y, grid.z},
                 {block.x, block.y, block.z},
                 shared_bytes_of<KERNEL>(name, shared),
                 [](void* call) LLAMA2RT_UNCHECKED { (*static_cast<decltype(body)*>(call))(); },
                 &body});
}

}  // namespace llama2rt

// Stands in for csrc/cuda/launch.cuh: a kernel runs on this CPU, at once.
#pragma once

#include <cuda_runtime.h>

#include "emulator.h"

namespace llama2rt {

// The block's dynamic shared memory, poisoned before every block. __shared__ itself is not defined
// here, so that an array which would escape this does not compile.
extern LLAMA2RT_EMULATOR_TLS unsigned char* shared_memory;

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  // The arguments lie on the stack of the host, which is no memory of a CUDA thread.
  auto body = [&]() __attribute__((no_sanitize("kernel-address"))) { kernel(arguments...); };
  emulator::run({name,
                 {grid.x, grid.y, grid.z},
                 {block.x, block.y, block.z},
                 shared_bytes,
                 [](void* call) { (*static_cast<decltype(body)*>(call))(); },
                 &body});
}

}  // namespace llama2rt

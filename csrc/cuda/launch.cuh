// The one way a kernel is launched: on a named device and stream, with its error checked at once.
// csrc/emulator has a header of the same name, which is why kernels include it as <launch.cuh>.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "shared_bytes.h"

namespace llama2rt {

// The block's dynamic shared memory. Kernels cast it and have no other: the emulator poisons this
// one before every block.
extern __shared__ __align__(1024) unsigned char shared_memory[];

// What a kernel may use without asking for it first.
constexpr size_t DEFAULT_SHARED_BYTES = 48 * 1024;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current and puts the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

template <auto KERNEL, size_t MOST, typename... Arguments>
void launch(const char* name, dim3 grid, dim3 block, SharedBytes<MOST> shared, cudaStream_t stream,
            Arguments... arguments) {
  const size_t bytes = shared_bytes_of<KERNEL>(name, shared);
  if (bytes > DEFAULT_SHARED_BYTES)
    check(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
          name);
  KERNEL<<<grid, block, bytes, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace llama2rt

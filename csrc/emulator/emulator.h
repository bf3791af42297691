// Runs the kernels of csrc/cuda on a CPU, thread by thread, so that their tests need no GPU.
//
// A thread block runs on one OS thread and each of its CUDA threads is a fiber there, with a stack
// of its own. A fiber runs until it waits for others: at a barrier, in an operation of its warp, for
// a copy. Which fiber goes on is drawn from a seed, anew for every launch and block, and shared
// memory starts as NaN: a barrier that is missing shows as a wrong result under most seeds. Every
// access to memory that a kernel makes is checked (memory.cpp).
//
// Left out: time. An emulated kernel says nothing about the speed of the real one. Left out too:
// blocks that wait for each other, which no kernel here does, and memory so weakly ordered that
// another thread of the block sees two writes in the wrong order.
//
// This header is for the headers that stand in for CUDA's own (cuda_runtime.h and so on).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

namespace llama2rt::emulator {

constexpr int WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_SHARED_BYTES = 227 * 1024;  // what an H100 gives one block
// Multiprocessors that kernels are told of: few, so that a persistent grid takes several turns.
constexpr int MULTIPROCESSORS = 3;

// Where in a source a thread synchronises.
struct Site {
  const char* file = nullptr;
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Launch {
  const char* kernel;
  uint3 grid, block;
  size_t shared_bytes;
  void (*body)(void*);  // calls the kernel once, as the thread that threadIdx names
  void* arguments;
};

// Runs a grid to its end. std::runtime_error, naming kernel, block, thread and seed, for whatever
// the kernel did wrong.
void run(const Launch&);

// ---- Settings of the tests ----
void set_seed(uint64_t seed);        // also starts the count of launches again
void set_os_threads(unsigned count);  // blocks that run at once; at least 1
// The memory that kernels may touch from now on, as (address, bytes).
void set_buffers(const std::vector<std::pair<uintptr_t, size_t>>&);

// The barriers and waits that kernels have come by, as "file.cu:line", since the last set_seed.
std::vector<std::string> sync_points();
// Leaves out the one at this place, "" for none: a test must then fail.
void leave_out(const std::string& sync_point);

// ---- For code that runs as a CUDA thread ----

// Ends the launch with an error that names this thread.
[[noreturn]] void fail(const std::string& reason);

// Barrier `id` of the block, complete when `threads` have arrived; with `wait`, until it is.
void barrier(unsigned id, unsigned threads, bool wait, Site site);
void block_barrier(Site site);  // __syncthreads

// Whether a wait at this place is left out. Barriers ask for themselves.
bool left_out(Site site);

// An operation of the lanes in `mask`, each of which brings its own `arguments`. The last lane to
// arrive carries it out for all of them, over the arguments of every lane by its number.
using Operation = void (*)(void* const* arguments, unsigned mask);
void collective(unsigned mask, const char* name, Operation operation, void* arguments);

// Waits until ready(context). Whoever may have made it true calls notify() afterwards.
void wait_until(const char* what, bool (*ready)(void*), void* context);
void notify();

// Runs `work` at some later time, drawn from the seed: at the latest when no thread can go on, or
// at the end of the block. For hardware that works beside the threads.
void defer(std::function<void()> work);

// Fails unless the bytes lie in a buffer or in the block's shared memory and are aligned.
void check_global(const void* address, size_t bytes, size_t alignment);
void check_shared(const void* address, size_t bytes, size_t alignment);

// cp.async of the calling thread: copies of 16 bytes, in groups.
struct Copy {
  void* shared;
  const void* global;  // null: zeros
};
struct CopyGroups {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
};
CopyGroups& copy_groups();

// Whatever else stand-ins for hardware keep about the calling thread; null when a block starts.
std::shared_ptr<void>& thread_state();

unsigned lane();

// What uninitialised memory holds: NaN in bf16, fp16 and fp32, -1 as an integer.
constexpr unsigned char POISON = 0xff;

}  // namespace llama2rt::emulator

// Rewritten whenever another fiber goes on. initial-exec: one instruction instead of a call.
#define LLAMA2RT_EMULATOR_TLS __attribute__((tls_model("initial-exec"))) __thread
extern LLAMA2RT_EMULATOR_TLS uint3 threadIdx, blockIdx, blockDim, gridDim;

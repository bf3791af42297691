// One thread block on one OS thread: its fibers, the order in which they run, what they wait for.
#pragma once

#include <array>

#include "emulator.h"

namespace llama2rt::emulator {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int BARRIERS = 16;
constexpr unsigned MAX_WARPS = MAX_THREADS / WARP;

// xorshift64*: small, and good enough to shuffle with.
struct Random {
  uint64_t state = 1;
  explicit Random(uint64_t seed = 1);
  unsigned below(unsigned bound);
};

uint64_t mix(uint64_t a, uint64_t b);  // a seed of two
std::string text(Site site);           // "file.cu:line"
bool is_left_out(const std::string& sync_point);

// What a fiber waits for, in the words of an error message.
struct Wait {
  const char* what = "";
  unsigned id = 0, threads = 0;  // of a barrier
  Site site;
};

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;  // its lowest byte
  uint3 index{};
  unsigned number = 0;
  bool done = false;
  Wait wait;
  bool (*ready)(void*) = nullptr;
  void* ready_context = nullptr;
  CopyGroups copies;
  std::shared_ptr<void> state;
};

struct Warp {
  unsigned exists = 0, runnable = 0, polling = 0;
  unsigned collecting = 0;  // lanes that wait inside a collective
  std::array<unsigned, WARP> mask{};
  std::array<Operation, WARP> operation{};
  std::array<const char*, WARP> name{};
  std::array<void*, WARP> arguments{};
};

struct Barrier {
  unsigned arrived = 0, expected = 0;
  Site site;
  std::array<unsigned, MAX_WARPS> waiting{};  // lanes of each warp
};

// A place where threads synchronise, and whether a test has it left out.
struct SyncPoint {
  Site site;
  bool left_out;
};

struct Failure {
  std::string message;
};

class Block {
 public:
  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs the block to its end; throws Failure.
  void run(const Launch& launch, uint3 index, uint64_t seed);

  [[noreturn]] void fail(const std::string& reason);
  void barrier(unsigned id, unsigned threads, bool wait, bool uniform, Site site);
  void collective(unsigned mask, const char* name, Operation operation, void* arguments);
  void wait_until(const char* what, bool (*ready)(void*), void* context);
  bool poll();
  bool left_out(Site site);
  std::vector<SyncPoint>& sync_points() { return sync_points_; }
  void defer(std::function<void()> work) { deferred_.push_back(std::move(work)); }

  unsigned draw(unsigned bound) { return random_.below(bound); }  // below `bound`, from the seed

  Fiber& fiber() { return *fiber_; }
  const Launch& launch() const { return *launch_; }
  unsigned threads() const { return threads_; }
  unsigned char* shared() { return shared_; }
  bool on_own_stack(uintptr_t address) const {
    return address - (uintptr_t)fiber_->stack < STACK_BYTES;
  }
  bool in_shared(uintptr_t address, size_t bytes) const {
    const uintptr_t offset = address - (uintptr_t)shared_;
    return offset <= launch_->shared_bytes && bytes <= launch_->shared_bytes - offset;
  }

 private:
  static void enter();
  void start(Fiber&);
  void resume(Fiber&);
  void suspend();  // back to the scheduler, until this fiber is runnable again
  void schedule();
  bool run_deferred();
  void shuffle_warps();
  std::string standstill() const;
  std::string who(const Fiber&) const;

  const Launch* launch_ = nullptr;
  uint3 index_{};
  unsigned threads_ = 0, warps_ = 0, live_ = 0;
  Random random_;
  std::vector<Fiber> fibers_;
  std::array<Warp, MAX_WARPS> warp_;
  std::array<unsigned, MAX_WARPS> order_{};  // of warps: the first that can go on does
  std::array<Barrier, BARRIERS> barrier_;
  std::vector<std::function<void()>> deferred_;
  unsigned char *memory_ = nullptr, *shared_ = nullptr;
  Fiber* fiber_ = nullptr;  // the running one
  void* scheduler_ = nullptr;
  std::string error_;
  std::vector<SyncPoint> sync_points_;
};

// The block that the calling OS thread runs a fiber of; null in host code and in the scheduler.
extern LLAMA2RT_EMULATOR_TLS Block* current;

}  // namespace llama2rt::emulator

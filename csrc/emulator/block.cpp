#include "block.h"

#include <string.h>
#include <sys/mman.h>

#include <map>
#include <new>
#include <numeric>

#if !defined(__x86_64__)
#error "The emulator's context switch is written for x86-64."
#endif

// switch_stack(&from, to): saves the registers that a call must keep, and the stack pointer in
// `from`, and goes on with what was saved on the stack `to`. ucontext would save the signal mask
// too, by a system call each time.
asm(R"(
    .text
    .hidden llama2rt_switch_stack
    .globl llama2rt_switch_stack
    .type llama2rt_switch_stack, @function
llama2rt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size llama2rt_switch_stack, . - llama2rt_switch_stack
)");
extern "C" void llama2rt_switch_stack(void** from, void* to);

LLAMA2RT_EMULATOR_TLS uint3 threadIdx, blockIdx, blockDim, gridDim;
namespace llama2rt {
extern LLAMA2RT_EMULATOR_TLS unsigned char* shared_memory;
LLAMA2RT_EMULATOR_TLS unsigned char* shared_memory;
}  // namespace llama2rt

namespace llama2rt::emulator {

LLAMA2RT_EMULATOR_TLS Block* current;

namespace {

constexpr size_t GUARD_BYTES = 4096;
constexpr size_t SLOT_BYTES = GUARD_BYTES + STACK_BYTES;
constexpr size_t SHARED_ALIGNMENT = 1024;

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Wait& wait) {
  if (!wait.site.file) return wait.what;
  return "barrier " + std::to_string(wait.id) + " for " + std::to_string(wait.threads) +
         " threads, " + text(wait.site);
}

unsigned first_lane(unsigned mask) { return (unsigned)__builtin_ctz(mask); }

}  // namespace

std::string text(Site site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b + 0x632be59bd9b4e019;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

Random::Random(uint64_t seed) : state(seed ? seed : 1) {}

unsigned Random::below(unsigned bound) {
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (unsigned)(((state * 0x2545f4914f6cdd1d >> 32) * bound) >> 32);
}

Block::Block() : fibers_(MAX_THREADS) {
  // Touched page by page: a block of 128 threads uses 128 stacks, and of each a few kilobytes.
  void* memory = mmap(nullptr, MAX_THREADS * SLOT_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  for (unsigned i = 0; i < MAX_THREADS; ++i) {
    mprotect(memory_ + i * SLOT_BYTES, GUARD_BYTES, PROT_NONE);
    fibers_[i].stack = memory_ + i * SLOT_BYTES + GUARD_BYTES;
    fibers_[i].number = i;
  }
  shared_ = static_cast<unsigned char*>(::operator new(MAX_SHARED_BYTES,
                                                       std::align_val_t(SHARED_ALIGNMENT)));
}

Block::~Block() {
  munmap(memory_, MAX_THREADS * SLOT_BYTES);
  ::operator delete(shared_, std::align_val_t(SHARED_ALIGNMENT));
}

void Block::run(const Launch& launch, uint3 index, uint64_t seed) {
  launch_ = &launch;
  index_ = index;
  random_ = Random(seed);
  threads_ = live_ = launch.block.x * launch.block.y * launch.block.z;
  warps_ = (threads_ + WARP - 1) / WARP;
  warp_.fill({});
  barrier_.fill({});
  deferred_.clear();
  error_.clear();
  memset(shared_, POISON, launch.shared_bytes);
  for (unsigned i = 0; i < threads_; ++i) {
    start(fibers_[i]);
    warp_[i / WARP].exists |= 1u << i % WARP;
  }
  for (unsigned w = 0; w < warps_; ++w) warp_[w].runnable = warp_[w].exists;
  std::iota(order_.begin(), order_.end(), 0u);
  shuffle_warps();

  blockIdx = index;
  blockDim = launch.block;
  gridDim = launch.grid;
  shared_memory = shared_;
  schedule();
  if (!error_.empty()) throw Failure{error_};
}

void Block::start(Fiber& fiber) {
  const uint3 size = launch_->block;
  fiber.index = {fiber.number % size.x, fiber.number / size.x % size.y,
                 fiber.number / (size.x * size.y)};
  fiber.done = false;
  fiber.ready = nullptr;
  fiber.copies.open.clear();
  fiber.copies.committed.clear();
  fiber.state.reset();
  // As if enter() had been called and had then called switch_stack: six registers, the address to
  // return to, and one word that puts enter()'s frame where the calling convention wants it.
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES) - 1;
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(&Block::enter);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 7;
}

void Block::enter() {
  Block& block = *current;
  block.launch_->body(block.launch_->arguments);
  block.fiber_->done = true;
  --block.live_;
  block.suspend();
  __builtin_unreachable();
}

void Block::resume(Fiber& fiber) {
  fiber_ = &fiber;
  threadIdx = fiber.index;
  current = this;
  llama2rt_switch_stack(&scheduler_, fiber.stack_pointer);
  current = nullptr;
}

void Block::suspend() { llama2rt_switch_stack(&fiber_->stack_pointer, scheduler_); }

void Block::shuffle_warps() {
  for (unsigned i = warps_; i > 1; --i) std::swap(order_[i - 1], order_[random_.below(i)]);
}

// One warp runs for as long as it can before the next one gets its turn: that sets warps as far
// apart as the barriers allow. The lanes of a warp take turns at random.
void Block::schedule() {
  while (live_ > 0 && error_.empty()) {
    if (!deferred_.empty() && random_.below(8) == 0) run_deferred();
    unsigned w = 0;
    while (w < warps_ && !warp_[order_[w]].runnable) ++w;
    if (w == warps_) {
      if (poll() || run_deferred()) continue;
      error_ = standstill();
      return;
    }
    Warp& warp = warp_[order_[w]];
    const unsigned start = random_.below(WARP);
    const unsigned turned = warp.runnable >> start | (uint64_t)warp.runnable << (WARP - start);
    const unsigned lane = (first_lane(turned) + start) % WARP;
    warp.runnable &= ~(1u << lane);
    Fiber& fiber = fibers_[order_[w] * WARP + lane];
    resume(fiber);
  }
  while (error_.empty() && run_deferred()) {
  }
}

bool Block::run_deferred() {
  if (deferred_.empty()) return false;
  std::swap(deferred_[random_.below((unsigned)deferred_.size())], deferred_.back());
  const std::function<void()> work = std::move(deferred_.back());
  deferred_.pop_back();
  work();
  poll();
  return true;
}

bool Block::poll() {
  bool woken = false;
  for (unsigned w = 0; w < warps_; ++w)
    for (unsigned left = warp_[w].polling; left; left &= left - 1) {
      const unsigned lane = first_lane(left);
      const Fiber& fiber = fibers_[w * WARP + lane];
      if (!fiber.ready(fiber.ready_context)) continue;
      warp_[w].polling &= ~(1u << lane);
      warp_[w].runnable |= 1u << lane;
      woken = true;
    }
  return woken;
}

void Block::wait_until(const char* what, bool (*ready)(void*), void* context) {
  if (ready(context)) return;
  fiber_->ready = ready;
  fiber_->ready_context = context;
  fiber_->wait = {what, 0, 0, {}};
  warp_[fiber_->number / WARP].polling |= 1u << fiber_->number % WARP;
  suspend();
}

void Block::barrier(unsigned id, unsigned threads, bool wait, bool uniform, Site site) {
  if (left_out(site)) return;
  if (id >= BARRIERS) fail("there are barriers 0 to 15, got " + std::to_string(id));
  if (!uniform && (threads == 0 || threads % WARP || threads > MAX_THREADS))
    fail("a barrier takes a multiple of 32 threads, got " + std::to_string(threads));
  Barrier& b = barrier_[id];
  if (b.arrived == 0) {
    b.expected = threads;
    b.site = site;
  } else if (b.expected != threads) {
    fail("barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads at " +
         text(site) + ", where others wait for " + std::to_string(b.expected));
  } else if (uniform && (b.site.line != site.line || strcmp(b.site.file, site.file) != 0)) {
    fail("__syncthreads at " + text(site) + ", while other threads are at that of " +
         text(b.site));
  }
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    for (unsigned w = 0; w < warps_; ++w) {
      warp_[w].runnable |= b.waiting[w];
      b.waiting[w] = 0;
    }
    shuffle_warps();
    // The last thread to arrive gets no head start.
    if (wait) warp_[fiber_->number / WARP].runnable |= 1u << fiber_->number % WARP;
  } else if (wait) {
    b.waiting[fiber_->number / WARP] |= 1u << fiber_->number % WARP;
  }
  if (!wait) return;
  fiber_->wait = {"a barrier", id, threads, site};
  suspend();
}

bool Block::left_out(Site site) {
  for (const SyncPoint& known : sync_points_)
    if (known.site.line == site.line && known.site.file == site.file) return known.left_out;
  sync_points_.push_back({site, is_left_out(text(site))});
  return sync_points_.back().left_out;
}

void Block::collective(unsigned mask, const char* name, Operation operation, void* arguments) {
  Warp& warp = warp_[fiber_->number / WARP];
  const unsigned lane = fiber_->number % WARP, bit = 1u << lane;
  mask &= warp.exists;
  if (!(mask & bit)) fail(std::string(name) + " with a mask that leaves out the calling lane");
  warp.mask[lane] = mask;
  warp.operation[lane] = operation;
  warp.name[lane] = name;
  warp.arguments[lane] = arguments;
  warp.collecting |= bit;
  for (unsigned left = mask & warp.collecting; left; left &= left - 1) {
    const unsigned other = first_lane(left);
    if (warp.operation[other] != operation || warp.mask[other] != mask)
      fail(std::string(name) + " while lane " + std::to_string(other) + " of the warp is at " +
           warp.name[other] + ": the warp has diverged");
  }
  if ((warp.collecting & mask) == mask) {
    operation(warp.arguments.data(), mask);
    warp.collecting &= ~mask;
    warp.runnable |= mask;
  } else {
    fiber_->wait = {name, 0, 0, {}};
  }
  suspend();
}

std::string Block::who(const Fiber& fiber) const {
  return std::string("kernel ") + launch_->kernel + ", block " + text(index_) + ", thread " +
         text(fiber.index);
}

void Block::fail(const std::string& reason) {
  error_ = who(*fiber_) + ": " + reason;
  suspend();  // for good: nothing is resumed after an error
  __builtin_unreachable();
}

std::string Block::standstill() const {
  std::map<std::string, unsigned> waiting;
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < threads_; ++i) {
    const Fiber& fiber = fibers_[i];
    if (fiber.done) continue;
    if (!first) first = &fiber;
    ++waiting[text(fiber.wait)];
  }
  std::string message = who(*first) + ": no thread can go on:";
  for (auto& [what, count] : waiting) message += " " + std::to_string(count) + " at " + what + ",";
  return message + " " + std::to_string(threads_ - live_) + " have ended";
}

}  // namespace llama2rt::emulator

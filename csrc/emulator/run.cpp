// A grid: its blocks, in an order drawn from the seed, over a few OS threads.
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>

#include "block.h"

namespace llama2rt::emulator {
namespace {

std::mutex mutex;  // guards what follows
uint64_t seed = 0, launches = 0;
unsigned os_threads = 1;
std::set<std::string> met;  // sync points
std::string omitted;
std::vector<std::unique_ptr<Block>> idle;  // a thousand stacks each: kept from launch to launch

std::unique_ptr<Block> take() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (idle.empty()) return std::make_unique<Block>();
  std::unique_ptr<Block> block = std::move(idle.back());
  idle.pop_back();
  return block;
}

void give_back(std::unique_ptr<Block> block) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const SyncPoint& point : block->sync_points()) met.insert(text(point.site));
  block->sync_points().clear();
  idle.push_back(std::move(block));
}

void check(const Launch& launch) {
  const uint3 grid = launch.grid, block = launch.block;
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  const char* wrong = nullptr;
  if (!grid.x || !grid.y || !grid.z || !threads)
    wrong = "a grid or block without threads";
  else if (threads > MAX_THREADS || block.z > 64)
    wrong = "a block of more than 1024 threads (64 along z)";
  else if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
    wrong = "a grid of more than 2147483647 x 65535 x 65535 blocks";
  else if (launch.shared_bytes > MAX_SHARED_BYTES)
    wrong = "a block with more than 227 KiB of shared memory";
  if (wrong) throw std::runtime_error(std::string(launch.kernel) + ": " + wrong);
}

}  // namespace

void set_seed(uint64_t value) {
  const std::lock_guard<std::mutex> lock(mutex);
  seed = value;
  launches = 0;
  met.clear();
}

std::vector<std::string> sync_points() {
  const std::lock_guard<std::mutex> lock(mutex);
  return {met.begin(), met.end()};
}

void leave_out(const std::string& sync_point) {
  const std::lock_guard<std::mutex> lock(mutex);
  omitted = sync_point;
}

bool is_left_out(const std::string& sync_point) {
  const std::lock_guard<std::mutex> lock(mutex);
  return sync_point == omitted;
}

void set_os_threads(unsigned count) {
  const std::lock_guard<std::mutex> lock(mutex);
  os_threads = count > 0 ? count : 1;
}

void run(const Launch& launch) {
  check(launch);
  const uint64_t blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
  uint64_t launch_seed, shown_seed;
  unsigned workers;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    shown_seed = seed;
    launch_seed = mix(seed, launches++);
    workers = (unsigned)std::min<uint64_t>(os_threads, blocks);
  }
  // Block i of the order is block (start + i * step) % blocks; step shares no factor with blocks.
  const uint64_t start = launch_seed % blocks;
  uint64_t step = mix(launch_seed, 1) % blocks | 1;
  while (std::gcd(step, blocks) != 1) step += 2;

  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::string error;
  auto work = [&] {
    std::unique_ptr<Block> block = take();
    for (uint64_t i; !failed && (i = next++) < blocks;) {
      const uint64_t number = (uint64_t)((start + (unsigned __int128)i * step) % blocks);
      const uint3 index = {(unsigned)(number % launch.grid.x),
                           (unsigned)(number / launch.grid.x % launch.grid.y),
                           (unsigned)(number / launch.grid.x / launch.grid.y)};
      try {
        block->run(launch, index, mix(launch_seed, number + 2));
      } catch (const Failure& failure) {
        if (!failed.exchange(true)) error = failure.message;
      }
    }
    give_back(std::move(block));
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (failed) throw std::runtime_error(error + " (emulator seed " + std::to_string(shown_seed) + ")");
}

void fail(const std::string& reason) { current->fail(reason); }

void barrier(unsigned id, unsigned threads, bool wait, Site site) {
  current->barrier(id, threads, wait, false, site);
}

void block_barrier(Site site) { current->barrier(0, current->threads(), true, true, site); }

bool left_out(Site site) { return current->left_out(site); }

void collective(unsigned mask, const char* name, Operation operation, void* arguments) {
  current->collective(mask, name, operation, arguments);
}

void wait_until(const char* what, bool (*ready)(void*), void* context) {
  current->wait_until(what, ready, context);
}

void notify() { current->poll(); }

void defer(std::function<void()> work) { current->defer(std::move(work)); }

CopyGroups& copy_groups() { return current->fiber().copies; }

std::shared_ptr<void>& thread_state() { return current->fiber().state; }

unsigned lane() { return current->fiber().number % WARP; }

}  // namespace llama2rt::emulator

// What Hopper's units do beside the threads: barriers that count bytes, tile copies, products of a
// warp group. See ptx_sm90.cuh for when they do it; sections are named as in the PTX ISA.
#include <string.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>

#include "block.h"
#include "ptx_sm90.cuh"

namespace llama2rt::emulator {
namespace {

constexpr unsigned GROUP_ROWS_OF_WARP = 16, STEP = 16;  // rows of a warp, and a product's depth
constexpr int ROW_BYTES = 128;                          // of the swizzle

// The 128-byte swizzle: of an address in shared memory, the 16-byte unit inside a row of 128 bytes
// is exchanged according to the row's number among eight (Canonical Layouts, Swizzle<3, 4, 3>).
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

uint32_t shared_offset(const void* pointer) {
  return (uint32_t)((const unsigned char*)pointer - current->shared());
}

// Work of a unit that may take much longer than a thread takes to its next instruction: put off
// `times` times over.
void defer_late(Block* block, unsigned times, const std::function<void()>& work) {
  block->defer([=] { times ? defer_late(block, times - 1, work) : work(); });
}

// ---- mbarrier ----

// Memory that was never initialised is all ones, and so `not_initialised`.
struct Mbarrier {
  uint64_t not_initialised : 1, invisible_to_tma : 1, parity : 1;
  uint64_t count : 20, left : 20;  // arrivals: of a phase, and of this one still to come
  uint64_t bytes : 21;             // still to come in this phase
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

Mbarrier& mbarrier(uint64_t* barrier) {
  check_shared(barrier, 8, 8);
  auto& b = *reinterpret_cast<Mbarrier*>(barrier);
  if (b.not_initialised) fail("an mbarrier that is not initialised, or not yet for this thread");
  return b;
}

void end_phase_if_complete(Mbarrier& b) {
  if (b.left || b.bytes) return;
  b.left = b.count;
  b.parity ^= 1;
}

// ---- Products of a warp ----

// Sums on their way, rows x columns: `lanes` are where the threads expect them.
struct Sums {
  unsigned columns;
  uint64_t last;  // the product that changes them last, by its number
  float* lanes[WARP];
  std::vector<float> values;
};

struct Product {
  WarpgroupProduct common;
  const uint32_t* a[WARP];
  Sums* sums;
};

// Row and column of a thread's i-th sum in its warp (Register Fragments, accumulator D).
unsigned row_of(unsigned lane, unsigned i) { return lane / 4 + 8 * (i / 2 % 2); }
unsigned column_of(unsigned lane, unsigned i) { return 8 * (i / 4) + lane % 4 * 2 + i % 2; }

float number(uint16_t bits, bool is_bf16) {
  return is_bf16 ? __bfloat162float({bits}) : __half2float({bits});
}

struct Products {
  unsigned char* shared;
  unsigned warp;  // in its group
  bool fenced = false, early = false;  // early: not only when a thread waits
  uint64_t issued = 0, done = 0, waited_for = 0;  // products
  std::deque<Product> waiting;                    // issued, not done
  std::deque<uint64_t> groups;    // number of products issued up to each commit
  std::map<float*, std::unique_ptr<Sums>> sums;  // by lane 0's registers

  uint16_t load(uint32_t address) const {
    uint16_t bits;
    memcpy(&bits, shared + swizzled(address), 2);
    return bits;
  }

  struct Descriptor {
    uint32_t start, leading, stride;
    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3fff) << 4),
          leading((bits >> 16 & 0x3fff) << 4),
          stride((bits >> 32 & 0x3fff) << 4) {}
    // Element (row, k) where K is contiguous, (k, column) where N is.
    uint32_t k_contiguous(unsigned row, unsigned k) const {
      return start + row / 8 * stride + row % 8 * ROW_BYTES + 2 * k;
    }
    uint32_t n_contiguous(unsigned k, unsigned column) const {
      return start + k / 8 * stride + k % 8 * ROW_BYTES + column / 64 * leading + column % 64 * 2;
    }
  };

  void carry_out_next() {
    const Product p = waiting.front();
    waiting.pop_front();
    ++done;
    const bool is_bf16 = p.common.is_bf16;
    const unsigned columns = p.common.columns;
    const Descriptor at_a(p.common.a_descriptor), at_b(p.common.b_descriptor);
    float a[GROUP_ROWS_OF_WARP][STEP], b[STEP][128];
    for (unsigned k = 0; k < STEP; ++k)
      for (unsigned n = 0; n < columns; ++n)
        b[k][n] = number(load(p.common.a_registers ? at_b.n_contiguous(k, n)
                                                   : at_b.k_contiguous(n, k)),
                         is_bf16);
    for (unsigned row = 0; row < GROUP_ROWS_OF_WARP; ++row)
      for (unsigned k = 0; k < STEP; ++k) {
        if (p.common.a_registers) {  // Register Fragments, A
          const uint32_t pair = p.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
          a[row][k] = number((uint16_t)(pair >> 16 * (k % 2)), is_bf16);
        } else {
          const unsigned group_row = GROUP_ROWS_OF_WARP * warp + row;
          a[row][k] = number(load(at_a.k_contiguous(group_row, k)), is_bf16);
        }
      }
    for (unsigned row = 0; row < GROUP_ROWS_OF_WARP; ++row) {
      float* sums = &p.sums->values[row * columns];
      if (!p.common.accumulate) std::fill(sums, sums + columns, 0.0f);
      for (unsigned k = 0; k < STEP; ++k)
        for (unsigned n = 0; n < columns; ++n) sums[n] += a[row][k] * b[k][n];
    }
  }

  // Takes the sums out of the threads' registers, where nobody may read them until the wait.
  Sums* take(const WarpgroupProduct& p, void* const* arguments) {
    std::unique_ptr<Sums>& held = sums[p.sums];
    if (!held) {
      held = std::make_unique<Sums>();
      held->columns = p.columns;
      held->values.resize(GROUP_ROWS_OF_WARP * p.columns);
      for (unsigned lane = 0; lane < WARP; ++lane) {
        held->lanes[lane] = static_cast<WarpgroupProduct*>(arguments[lane])->sums;
        for (unsigned i = 0; i < p.columns / 2; ++i)
          held->values[row_of(lane, i) * p.columns + column_of(lane, i)] = held->lanes[lane][i];
        memset(held->lanes[lane], POISON, p.columns / 2 * sizeof(float));
      }
    }
    held->last = issued;
    return held.get();
  }

  void give_back() {
    for (auto it = sums.begin(); it != sums.end();) {
      const Sums& held = *it->second;
      if (held.last >= waited_for) {
        ++it;
        continue;
      }
      for (unsigned lane = 0; lane < WARP; ++lane)
        for (unsigned i = 0; i < held.columns / 2; ++i)
          held.lanes[lane][i] = held.values[row_of(lane, i) * held.columns + column_of(lane, i)];
      it = sums.erase(it);
    }
  }
};

// ---- What the units keep about a thread, and lane 0 of a warp about its products ----

struct Hopper {
  std::vector<uint64_t*> barriers;  // initialised, not yet visible to TMA
  std::vector<void*> zeros;         // written, not yet visible to the asynchronous units
  std::shared_ptr<Products> products;
};

Hopper& hopper() {
  std::shared_ptr<void>& kept = thread_state();
  if (!kept) kept = std::make_shared<Hopper>();
  return *static_cast<Hopper*>(kept.get());
}

struct WarpCall {
  std::shared_ptr<Products> products;  // lane 0's
  unsigned pending = 0;
};

WarpCall warp_call() {
  WarpCall call;
  if (lane() == 0) {
    std::shared_ptr<Products>& products = hopper().products;
    if (!products) {
      products = std::make_shared<Products>();
      products->shared = current->shared();
      products->warp = current->fiber().number / WARP % 4;
    }
    call.products = products;
  }
  return call;
}

struct ProductCall : WarpgroupProduct {
  std::shared_ptr<Products> products;
};

void issue(void* const* arguments, unsigned) {
  const auto& first = *static_cast<ProductCall*>(arguments[0]);
  Products& products = *first.products;
  if (!products.fenced) fail("wgmma.mma_async without a wgmma.fence since the last wait");
  for (unsigned lane = 1; lane < WARP; ++lane) {
    const auto& other = *static_cast<ProductCall*>(arguments[lane]);
    if (other.a_descriptor != first.a_descriptor || other.b_descriptor != first.b_descriptor ||
        other.accumulate != first.accumulate)
      fail("wgmma.mma_async with descriptors that differ between the lanes of a warp");
  }
  Product p;
  p.common = first;
  for (unsigned lane = 0; lane < WARP; ++lane)
    p.a[lane] = static_cast<ProductCall*>(arguments[lane])->a_registers;
  p.sums = products.take(first, arguments);
  products.waiting.push_back(p);
  ++products.issued;
  if (!products.early) return;
  defer([kept = first.products] {
    if (!kept->waiting.empty()) kept->carry_out_next();
  });
}

void fence(void* const* arguments, unsigned) {
  Products& products = *static_cast<WarpCall*>(arguments[0])->products;
  products.fenced = true;
  products.early = current->draw(2);
}

void commit(void* const* arguments, unsigned) {
  Products& products = *static_cast<WarpCall*>(arguments[0])->products;
  products.groups.push_back(products.issued);
}

void wait(void* const* arguments, unsigned) {
  const auto& call = *static_cast<WarpCall*>(arguments[0]);
  Products& products = *call.products;
  products.fenced = false;
  while (products.groups.size() > call.pending) {
    products.waited_for = products.groups.front();
    products.groups.pop_front();
    while (products.done < products.waited_for) products.carry_out_next();
  }
  products.give_back();
}

constexpr unsigned ALL = 0xffffffff;

}  // namespace

void mbarrier_init(uint64_t* barrier, uint32_t count) {
  check_shared(barrier, 8, 8);
  if (count == 0 || count >= 1 << 20)
    fail("an mbarrier counts 1 to 2^20 - 1 arrivals, got " + std::to_string(count));
  *reinterpret_cast<Mbarrier*>(barrier) = {0, 1, 0, count, count, 0};
  hopper().barriers.push_back(barrier);
}

void mbarrier_fence_init() {
  for (uint64_t* barrier : hopper().barriers) mbarrier(barrier).invisible_to_tma = 0;
  hopper().barriers.clear();
}

void mbarrier_arrive(uint64_t* barrier, uint32_t bytes) {
  Mbarrier& b = mbarrier(barrier);
  // Between phases `left` is what the next one expects: 0 is never seen.
  if (b.bytes + bytes >= 1 << 20) fail("an mbarrier expects at most 2^20 - 1 bytes");
  b.bytes += bytes;
  --b.left;
  end_phase_if_complete(b);
  notify();
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  struct Wait {
    Mbarrier* barrier;
    uint32_t parity;
  } wait = {&mbarrier(barrier), parity};
  wait_until("an mbarrier", [](void* context) {
    const Wait& w = *static_cast<Wait*>(context);
    return w.barrier->parity != w.parity;
  }, &wait);
}

void check_tensor_map(const TensorMap& map) {
  const char* wrong = nullptr;
  const int64_t most = (int64_t)1 << 40;
  if (map.tokens <= 0 || map.heads <= 0 || map.dim <= 0)
    wrong = "a dimension of 0";
  else if ((uintptr_t)map.base % 16 || map.token_stride % 16 || map.head_stride % 16)
    wrong = "an address or stride that is no multiple of 16 bytes";
  else if (map.token_stride < 0 || map.head_stride < 0 || map.token_stride >= most ||
           map.head_stride >= most)
    wrong = "a stride below 0 or of 2^40 bytes or more";
  else if (map.head_stride < 2 * map.dim || map.token_stride < map.heads * map.head_stride ||
           map.token_stride % map.head_stride)
    wrong = "a stride that does not span the dimension before it in whole strides";
  else if (map.box_tokens <= 0 || map.box_tokens > 256)
    wrong = "a box of more than 256 tokens, or none";
  if (wrong) throw std::runtime_error(std::string("tensor map: ") + wrong);
}

// A row of the box lies inside the tensor or arrives as zeros.
void copy_box(void* to, const TensorMap& map, uint64_t* barrier, int column, int head, int token) {
  const unsigned bytes = (unsigned)map.box_tokens * ROW_BYTES;
  check_shared(to, bytes, 128);
  if (mbarrier(barrier).invisible_to_tma)
    fail("TMA on an mbarrier without fence.mbarrier_init after its initialisation");
  if (column < 0 || column + 64 > map.dim || head < 0 || head >= map.heads)
    fail("a box outside its tensor's heads or columns, which no kernel here means to copy");
  auto source = [=](int row) -> const unsigned char* {
    const int64_t t = (int64_t)token + row;
    if (t < 0 || t >= map.tokens) return nullptr;
    return map.base + t * map.token_stride + head * map.head_stride + 2 * column;
  };
  for (int row = 0; row < map.box_tokens; ++row)
    if (source(row)) check_global(source(row), ROW_BYTES, 16);
  auto arrive = [=, shared = current->shared(), offset = shared_offset(to)] {
    for (int row = 0; row < map.box_tokens; ++row)
      for (int unit = 0; unit < ROW_BYTES; unit += 16) {
        unsigned char* at = shared + swizzled(offset + (uint32_t)(row * ROW_BYTES + unit));
        if (source(row))
          memcpy(at, source(row) + unit, 16);
        else
          memset(at, 0, 16);
      }
    auto& b = *reinterpret_cast<Mbarrier*>(barrier);
    b.bytes -= bytes;
    end_phase_if_complete(b);
  };
  constexpr unsigned LATEST[] = {1, 64, 2048};
  defer_late(current, current->draw(LATEST[current->draw(3)]), arrive);
}

void store_zeros(void* to) {
  check_shared(to, 16, 16);
  hopper().zeros.push_back(to);
}

void fence_zeros() {
  for (void* to : hopper().zeros) memset(to, 0, 16);
  hopper().zeros.clear();
}

uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  check_shared(start, 16, 16);
  auto encode = [](uint32_t bytes) { return (uint64_t)((bytes & 0x3ffff) >> 4); };
  return encode(shared_offset(start)) | encode(leading) << 16 | encode(stride) << 32 |
         (uint64_t)1 << 62;
}

void warpgroup_multiply(WarpgroupProduct product) {
  ProductCall call{product, warp_call().products};
  collective(ALL, "wgmma.mma_async", issue, &call);
}

void warpgroup_fence() {
  WarpCall call = warp_call();
  collective(ALL, "wgmma.fence", fence, &call);
}

void warpgroup_commit() {
  WarpCall call = warp_call();
  collective(ALL, "wgmma.commit_group", commit, &call);
}

void warpgroup_wait(unsigned pending) {
  WarpCall call = warp_call();
  call.pending = pending;
  collective(ALL, "wgmma.wait_group", wait, &call);
}

}  // namespace llama2rt::emulator

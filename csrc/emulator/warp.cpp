// What the lanes of a warp do together: votes, shuffles, and the matrix instructions of sm_80.
#include <string.h>

#include "ptx.cuh"

namespace llama2rt::emulator {
namespace {

template <typename Arguments, typename Body>
void for_each_lane(void* const* arguments, unsigned mask, Body body) {
  for (unsigned left = mask; left; left &= left - 1) {
    const unsigned lane = (unsigned)__builtin_ctz(left);
    body(lane, *static_cast<Arguments*>(arguments[lane]));
  }
}

struct Vote {
  bool predicate;
  unsigned result;
};

void carry_out_vote(void* const* arguments, unsigned mask) {
  unsigned result = 0;
  for_each_lane<Vote>(arguments, mask,
                      [&](unsigned lane, Vote& v) { result |= (unsigned)v.predicate << lane; });
  for_each_lane<Vote>(arguments, mask, [&](unsigned, Vote& v) { v.result = result; });
}

struct Shuffle {
  uint64_t value;
  unsigned source;
  uint64_t result;
};

void carry_out_shuffle(void* const* arguments, unsigned mask) {
  for_each_lane<Shuffle>(arguments, mask, [&](unsigned, Shuffle& s) {
    // The value of a lane that takes no part is undefined.
    if (mask >> s.source & 1)
      s.result = static_cast<Shuffle*>(arguments[s.source])->value;
    else
      memset(&s.result, POISON, sizeof s.result);
  });
}

struct MatrixLoad {
  uint32_t* registers;
  const void* row;
};

template <unsigned COUNT, bool TRANSPOSED>
void carry_out_load(void* const* arguments, unsigned) {
  for (unsigned matrix = 0; matrix < COUNT; ++matrix) {
    uint16_t elements[8][8];
    for (unsigned row = 0; row < 8; ++row)
      memcpy(elements[row], static_cast<MatrixLoad*>(arguments[8 * matrix + row])->row, 16);
    for (unsigned lane = 0; lane < WARP; ++lane) {
      const unsigned i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = TRANSPOSED ? elements[j][i] : elements[i][j];
      const uint32_t high = TRANSPOSED ? elements[j + 1][i] : elements[i][j + 1];
      static_cast<MatrixLoad*>(arguments[lane])->registers[matrix] = low | high << 16;
    }
  }
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

template <bool BF16>
float number(uint32_t pair, unsigned which) {
  const auto bits = (uint16_t)(pair >> 16 * which);
  return BF16 ? __bfloat162float({bits}) : __half2float({bits});
}

template <bool BF16>
void carry_out_product(void* const* arguments, unsigned) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const Product& p = *static_cast<Product*>(arguments[lane]);
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned i = 0; i < 2; ++i)
      for (unsigned half = 0; half < 2; ++half) {
        a[group][pair + 8 * half + i] = number<BF16>(p.a[2 * half], i);
        a[group + 8][pair + 8 * half + i] = number<BF16>(p.a[2 * half + 1], i);
        b[pair + 8 * half + i][group] = number<BF16>(p.b[half], i);
      }
  }
  float product[16][8] = {};
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned k = 0; k < 16; ++k)
      for (unsigned column = 0; column < 8; ++column)
        product[row][column] += a[row][k] * b[k][column];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    float* d = static_cast<Product*>(arguments[lane])->d;
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) d[i] += product[group + i / 2 * 8][pair + i % 2];
  }
}

constexpr unsigned ALL = 0xffffffff;

// .aligned instructions: there is no such thing in part of a warp.
void whole_warp(const char* name) {
  if (blockDim.x * blockDim.y * blockDim.z % WARP)
    fail(std::string(name) + " in a block that is not made of whole warps");
}

}  // namespace

void warp_barrier(unsigned mask, Site site) {
  if (left_out(site)) return;
  collective(mask, "__syncwarp", [](void* const*, unsigned) {}, nullptr);
}

unsigned ballot(unsigned mask, bool predicate) {
  Vote vote{predicate, 0};
  collective(mask, "a vote", carry_out_vote, &vote);
  return vote.result;
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source) {
  Shuffle s{value, source, 0};
  collective(mask, "a shuffle", carry_out_shuffle, &s);
  return s.result;
}

void copy_async(void* shared, const void* global, bool valid) {
  check_shared(shared, 16, 16);
  if (valid) check_global(global, 16, 16);
  memset(shared, POISON, 16);
  copy_groups().open.push_back({shared, valid ? global : nullptr});
}

void copy_commit() {
  CopyGroups& groups = copy_groups();
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

void copy_wait(unsigned groups_left, Site site) {
  if (left_out(site)) return;
  auto& committed = copy_groups().committed;
  if (committed.size() <= groups_left) return;
  const size_t arrived = committed.size() - groups_left;
  for (size_t i = 0; i < arrived; ++i)
    for (const Copy& copy : committed[i])
      if (copy.global)
        memcpy(copy.shared, copy.global, 16);
      else
        memset(copy.shared, 0, 16);
  committed.erase(committed.begin(), committed.begin() + (ptrdiff_t)arrived);
}

void load_matrix(uint32_t* registers, unsigned count, const void* row, bool transposed) {
  whole_warp("ldmatrix");
  if (lane() < 8 * count) check_shared(row, 16, 16);
  MatrixLoad load{registers, row};
  if (count == 4)
    collective(ALL, "ldmatrix.x4", transposed ? carry_out_load<4, true> : carry_out_load<4, false>,
               &load);
  else
    collective(ALL, "ldmatrix.x2", transposed ? carry_out_load<2, true> : carry_out_load<2, false>,
               &load);
}

void multiply(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16) {
  whole_warp("mma");
  Product product{d, a, b};
  collective(ALL, "mma.m16n8k16", is_bf16 ? carry_out_product<true> : carry_out_product<false>,
             &product);
}

}  // namespace llama2rt::emulator

// Tokens from logits: the largest, or by the inverse of the cumulative distribution.
//
// A row's probabilities are never stored. Their sum is taken in blocks; the block in which the sum
// passes what a uniform number asks for is computed again, and its numbers are added one by one. Sums
// are fp64, in an order that depends on the row alone.
#include "parallel.h"

#include <math.h>

namespace LLAMA2RT_ISA {
namespace {

constexpr int64_t BLOCK = 512;
constexpr float LEAST = -INFINITY;

struct Row {
  const float* logits;
  int64_t columns;
  float temperature;

  f32v load_scaled(int64_t i) const {
    const f32v x = columns - i < W ? padded(i) : load(logits + i);
    return temperature == 1.0f ? x : x / temperature;
  }
  f32v padded(int64_t i) const {
    float lanes[W];
    for (int64_t j = 0; j < W; ++j) lanes[j] = i + j < columns ? logits[i + j] : LEAST;
    return load(lanes);
  }
};

float largest(const Row& row) {
  f32v most = broadcast(LEAST);
  for (int64_t i = 0; i < row.columns; i += W) {
    const f32v x = row.load_scaled(i);
    most = x > most ? x : most;
  }
  float lanes[W], result = LEAST;
  store(lanes, most);
  for (float lane : lanes) result = maximum(lane, result);
  return result;
}

// exp(x - most); of a padded lane it is 0.
f32v weights(const Row& row, int64_t i, float most) {
  const f32v x = row.load_scaled(i), e = exp(x - most);
  return x == broadcast(LEAST) ? f32v{} : e;
}

double sum_of_block(const Row& row, int64_t begin, int64_t end, float most) {
  typedef float half __attribute__((vector_size(2 * W)));
  typedef double wide __attribute__((vector_size(4 * W)));
  wide sums[2] = {};
  for (int64_t i = begin; i < end; i += W) {
    const f32v e = weights(row, i, most);
    half parts[2];
    memcpy(parts, &e, sizeof parts);
    for (int j = 0; j < 2; ++j) sums[j] += __builtin_convertvector(parts[j], wide);
  }
  const wide both = sums[0] + sums[1];
  double sum = 0;
  for (int j = 0; j < W / 2; ++j) sum += both[j];
  return sum;
}

// The first index whose cumulative weight, `before` included, is above the threshold; the last with
// any weight, where rounding leaves none.
int64_t passing(const Row& row, int64_t begin, int64_t end, float most, double before,
                double threshold) {
  int64_t last = begin;
  for (int64_t i = begin; i < end; i += W) {
    float lanes[W];
    store(lanes, weights(row, i, most));
    for (int64_t j = 0; j < W && i + j < end; ++j) {
      before += (double)lanes[j];
      if (before > threshold) return i + j;
      if (lanes[j] > 0) last = i + j;
    }
  }
  return last;
}

void sample_row(const Sample& a, int64_t r, double* sums) {
  const float temperature = a.temperatures[r];
  const Row row = {a.logits + r * a.logits_stride, a.columns,
                   temperature > 0 ? temperature : 1.0f};
  const float most = largest(row);
  const int64_t blocks = (a.columns + BLOCK - 1) / BLOCK;
  auto end_of = [&](int64_t block) {
    return (block + 1) * BLOCK < a.columns ? (block + 1) * BLOCK : a.columns;
  };
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block)
    total += sums[block] = sum_of_block(row, block * BLOCK, end_of(block), most);
  int64_t token = 0;
  if (temperature > 0) {
    const double threshold = a.uniform[r] * total;
    double before = 0;
    int64_t block = 0;
    while (block + 1 < blocks && !(before + sums[block] > threshold)) before += sums[block++];
    token = passing(row, block * BLOCK, end_of(block), most, before, threshold);
  } else {
    while (token + 1 < a.columns && row.logits[token] != most) ++token;
  }
  a.tokens[r] = token;
  const float x = temperature > 0 ? row.logits[token] / temperature : row.logits[token];
  a.logprobs[r] = (float)((double)(x - most) - log(total));
}

}  // namespace

void sample(const Sample& a) {
  const int64_t blocks = (a.columns + BLOCK - 1) / BLOCK;
  parallel(a.rows, a.rows * a.columns, a.threads, [&](int64_t begin, int64_t end) {
    Workspace<double> sums(blocks);
    for (int64_t r = begin; r < end; ++r) sample_row(a, r, sums.data);
  });
}

}  // namespace LLAMA2RT_ISA

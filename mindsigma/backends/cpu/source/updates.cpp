// What an optimiser does to memory: one pass, in place.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"

namespace {

constexpr long PIECE = 1 << 15;  // elements of a task

template <class F>
void pieces(long count, F f) {
  parallel((count + PIECE - 1) / PIECE, [&](long task) { f(task, task * PIECE, std::min(count, (task + 1) * PIECE)); });
}

}  // namespace

extern "C" {

// AdamW: rate is divided by the correction of m and multiplied by the root of that of v, eps by that root. A decay of an
// average comes with what it leaves to 1, which fp32 would round.
void update_adamw(float* parameter, const float* gradient, float* m, float* v, long count, float clip, float decay,
                  float rate, float beta1, float rest1, float beta2, float rest2, float eps) {
  pieces(count, [=](long, long begin, long end) {
    for (long i = begin; i < end; i++) {
      const float g = gradient[i] * clip;
      m[i] = beta1 * m[i] + rest1 * g;
      v[i] = beta2 * v[i] + rest2 * (g * g);
      parameter[i] = parameter[i] * decay - rate * m[i] / (std::sqrt(v[i]) + eps);
    }
  });
}

// mean = decay * mean + rest * value
void update_average(float* mean, const float* value, long count, float decay, float rest) {
  pieces(count, [=](long, long begin, long end) {
    for (long i = begin; i < end; i++) mean[i] = mean[i] * decay + value[i] * rest;
  });
}

double sum_of_squares(const float* x, long count) {
  std::vector<double> sums((count + PIECE - 1) / PIECE);
  pieces(count, [&](long task, long begin, long end) {
    constexpr int LANES = 32;  // sums that do not wait for each other
    double lanes[LANES] = {};
    long i = begin;
    for (; i + LANES <= end; i += LANES)
      for (int j = 0; j < LANES; j++) lanes[j] += double(x[i + j]) * x[i + j];
    for (; i < end; i++) lanes[0] += double(x[i]) * x[i];
    for (int j = 0; j < LANES; j++) sums[task] += lanes[j];
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}
}

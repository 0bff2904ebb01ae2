// Every reduction is a weighted sum over the tokens of a cell: learned weights, equal ones, or that of its first token.
#include "division.h"

#include <algorithm>
#include <vector>

#include "gradients.h"
#include "vector.h"

namespace {

constexpr float EPS = 1e-5f;  // of the norms
constexpr long STRIPE = 64;   // channels of a task
constexpr long SOME = 16;     // cells or rows of a task

void copy_columns(const float* from, long from_step, float* to, long to_step, long rows, long width) {
  parallel((rows + SOME - 1) / SOME, [&](long task) {
    for (long row = task * SOME; row < std::min(rows, task * SOME + SOME); row++)
      std::copy_n(from + row * from_step, width, to + row * to_step);
  });
}

// LayerNorm of x (rows, width).
void layer_norm(const float* x, Affine<const float> norm, float* to, long rows, long width) {
  Linear l{};
  l.x = x;
  l.rows = l.rows_of_image = rows;
  l.in = width;
  l.scale = norm.weight;
  l.shift = norm.bias;
  l.eps = EPS;
  normalise(l, to);
}

}  // namespace

// Of the first `parts` tokens of a cell: (parts, channels), and what is added to their sum.
struct Division::Factors {
  long parts;
  std::vector<float> of;
  const float* bias;
};

Division::Division(const DivisionPlan& plan, const BlockSizes& sizes, const Parts<const float>& parts, const float* qkv,
                   Memory& memory)
    : plan(plan), s(sizes), parts(parts), qkv(qkv) {
  const long all = s.rows() * s.channels;
  if (plan.qk_norm) q = memory.take(all), k = memory.take(all);
  if (plan.reduces()) cells = normed = memory.take(2 * of_cells());
  if (plan.reduction == Reduction::CONVOLUTION) normed = memory.take(2 * of_cells());
}

long Division::floats(const DivisionPlan& plan, const BlockSizes& s) {
  const long all = s.rows() * s.channels, of_cells = s.batch * plan.cells() * s.channels;
  return (plan.qk_norm ? 2 * all : 0) + (plan.reduces() ? 4 * of_cells : 0);
}

long Division::floats_of_gradient(const DivisionPlan& plan, const BlockSizes& s) {
  return floats(plan, s) + (plan.qk_norm ? 2 * s.rows() * s.channels : 0);
}

long Division::token(long image, long cell, long part) const {
  const long cells_across = plan.width / plan.across;
  const long row = cell / cells_across * plan.down + part / plan.across;
  const long column = cell % cells_across * plan.across + part % plan.across;
  return image * s.tokens + row * plan.width + column;
}

Division::Factors Division::factors() const {
  const long c = s.channels, all = plan.down * plan.across;
  if (plan.reduction == Reduction::FIRST) return {1, std::vector<float>(c, 1.0f), nullptr};
  Factors factors{all, std::vector<float>(all * c, 1.0f / all), nullptr};
  if (plan.reduction == Reduction::CONVOLUTION) {
    factors.bias = parts[REDUCTION].bias;
    const float* weight = parts[REDUCTION].weight;
    for (long channel = 0; channel < c; channel++)
      for (long part = 0; part < all; part++) factors.of[part * c + channel] = weight[channel * all + part];
  }
  return factors;
}

void Division::reduce(const float* x, long step, const Factors& f, float* to) const {
  const long c = s.channels, count = plan.cells();
  parallel((s.batch * count + SOME - 1) / SOME, [&](long task) {
    for (long i = task * SOME; i < std::min(s.batch * count, task * SOME + SOME); i++) {
      float* sum = to + i * c;
      if (f.bias)
        std::copy_n(f.bias, c, sum);
      else
        std::fill_n(sum, c, 0.0f);
      for (long part = 0; part < f.parts; part++) {
        const float *value = x + token(i / count, i % count, part) * step, *factor = f.of.data() + part * c;
        for (long channel = 0; channel < c; channel++) sum[channel] += factor[channel] * value[channel];
      }
    }
  });
}

void Division::run() const {
  const long c = s.channels, rows = s.rows();
  if (plan.qk_norm) {
    copy_columns(qkv, 3 * c, q, c, rows, c);
    copy_columns(qkv + c, 3 * c, k, c, rows, c);
    layer_norm(q, parts[Q_NORM], q, rows, c);
    layer_norm(k, parts[K_NORM], k, rows, c);
  }
  if (!plan.reduces()) return;
  const Factors f = factors();
  reduce(k ? k : qkv + c, k ? c : 3 * c, f, cells);
  reduce(qkv + 2 * c, 3 * c, f, cells + of_cells());
  if (normed != cells) layer_norm(cells, parts[KV_NORM], normed, 2 * s.batch * plan.cells(), c);
}

Attention Division::attention(float* out) const {
  const long c = s.channels;
  Attention a = s.attention(q ? q : qkv, q ? c : 3 * c, k ? k : qkv + c, k ? c : 3 * c, qkv + 2 * c, 3 * c, s.tokens,
                            out);
  if (plan.reduces()) {
    a.k = normed;
    a.v = normed + of_cells();
    a.k_step = a.v_step = c;
    a.keys = plan.cells();
  }
  return a;
}

Division::Gradients Division::receive(float* dqkv, Memory& memory) const {
  const long c = s.channels, all = s.rows() * c;
  Gradients to{dqkv, dqkv + c, dqkv + 2 * c, nullptr, nullptr, nullptr};
  if (plan.qk_norm) {
    to.q = memory.take(all), to.k = memory.take(all);
    to.raw = memory.take(all), to.result = memory.take(all);
  }
  if (plan.reduces()) {
    to.k = memory.take(2 * of_cells());
    to.v = to.k + of_cells();
    to.of_cells = memory.take(2 * of_cells());
  }
  return to;
}

// What a token was multiplied with, times the gradient of its cell; 0 for tokens that are in none.
void Division::spread(const float* of_cells, const Factors& f, float* dx, long step) const {
  const long c = s.channels, cells_across = plan.width / plan.across, cells_down = plan.height / plan.down;
  parallel(s.batch * plan.height, [&](long task) {
    const long image = task / plan.height, row = task % plan.height;
    for (long column = 0; column < plan.width; column++) {
      float* to = dx + (image * s.tokens + row * plan.width + column) * step;
      const long part = row % plan.down * plan.across + column % plan.across;
      const long cell_row = row / plan.down, cell_column = column / plan.across;
      if (cell_row >= cells_down || cell_column >= cells_across || part >= f.parts) {
        std::fill_n(to, c, 0.0f);
        continue;
      }
      const float* gradient = of_cells + (image * plan.cells() + cell_row * cells_across + cell_column) * c;
      const float* factor = f.of.data() + part * c;
      for (long i = 0; i < c; i++) to[i] = factor[i] * gradient[i];
    }
  });
}

// Of the convolution's weight (channels, parts).
void Division::gradient_of_factors(const float* of_cells, long parts, float* gradient) const {
  const long c = s.channels;
  parallel((c + STRIPE - 1) / STRIPE, [&](long task) {
    const long begin = task * STRIPE, end = std::min(c, begin + STRIPE);
    for (long part = 0; part < parts; part++) {
      V sums[STRIPE / VL] = {};
      for (long image = 0; image < 2 * s.batch; image++) {  // the keys of all images, then their values
        const bool of_keys = image < s.batch;
        const long step = of_keys && k ? c : 3 * c;
        const float* x = (!of_keys ? qkv + 2 * c : k ? k : qkv + c) + token(image % s.batch, 0, part) * step;
        const float* slope = of_cells + image * plan.cells() * c;
        for (long row = 0; row < plan.height / plan.down; row++) {
          V some[STRIPE / VL] = {};
          const float* value = x + row * plan.down * plan.width * step;
          for (long cell = 0; cell < plan.width / plan.across; cell++, value += plan.across * step, slope += c)
            for (long i = begin; i < end; i += VL) {
              const long n = std::min<long>(VL, end - i);
              some[(i - begin) / VL] += get(value + i, n) * get(slope + i, n);
            }
          for (int i = 0; i < STRIPE / VL; i++) sums[i] += some[i];
        }
      }
      for (long i = begin; i < end; i++) gradient[i * parts + part] = sums[(i - begin) / VL][(i - begin) % VL];
    }
  });
}

// dy of queries or keys after their norm, to the columns of dqkv from `column` on.
void Division::through_norm(Part part, long column, const float* dy, const Gradients& from, float* dqkv,
                            const Parts<float>& gradients) const {
  const long c = s.channels, rows = s.rows();
  copy_columns(qkv + column, 3 * c, from.raw, c, rows, c);
  gradient_of_norm(dy, from.raw, parts[part].weight, EPS, nullptr, from.result, gradients[part].bias,
                   gradients[part].weight, {1, rows, 0}, c);
  copy_columns(from.result, c, dqkv + column, 3 * c, rows, c);
}

void Division::backward(const Gradients& from, float* dqkv, const Parts<float>& gradients) const {
  const long c = s.channels, rows = 2 * s.batch * plan.cells();
  if (plan.reduces()) {
    const Factors f = factors();
    const float* of_sums = from.k;
    if (plan.reduction == Reduction::CONVOLUTION) {
      gradient_of_norm(from.k, cells, parts[KV_NORM].weight, EPS, nullptr, from.of_cells, gradients[KV_NORM].bias,
                       gradients[KV_NORM].weight, {1, rows, 0}, c);
      gradient_of_factors(from.of_cells, f.parts, gradients[REDUCTION].weight);
      gradient_of_bias(from.of_cells, gradients[REDUCTION].bias, rows, c);
      of_sums = from.of_cells;
    }
    // k, after its norm, is read by the gradient of the factors alone: its place takes the gradient.
    spread(of_sums, f, k ? k : dqkv + c, k ? c : 3 * c);
    spread(of_sums + of_cells(), f, dqkv + 2 * c, 3 * c);
  }
  if (!plan.qk_norm) return;
  through_norm(Q_NORM, 0, from.q, from, dqkv, gradients);
  through_norm(K_NORM, c, plan.reduces() ? k : from.k, from, dqkv, gradients);
}

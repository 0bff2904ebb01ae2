// Sums over rows run stripe by stripe.
#include "gradients.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "pool.h"
#include "products.h"
#include "vector.h"

namespace {

constexpr long STRIPE = 64;   // columns of a task
constexpr long SUMMED = 128;  // rows that are summed one after the other before their sum joins the others

// Rows of sums over the rows of each image, to the places `to`: f(row, place, n, sums) adds to SUMS vectors what stands
// at `place` of a matrix with `width` columns.
template <int SUMS, class F>
void sum_columns(Images images, long width, std::array<float*, SUMS> to, F f) {
  const long stripes = (width + STRIPE - 1) / STRIPE;
  parallel(images.count * stripes, [&](long task) {
    const long image = task / stripes, begin = task % stripes * STRIPE, end = std::min(width, begin + STRIPE);
    V sums[STRIPE / VL][SUMS] = {};
    for (long first = 0; first < images.rows; first += SUMMED) {
      V part[STRIPE / VL][SUMS] = {};
      for (long i = first; i < std::min(images.rows, first + SUMMED); i++) {
        const long row = image * images.rows + i;
        for (long j = 0; begin + j * VL < end; j++)
          f(row, row * width + begin + j * VL, std::min<long>(VL, end - begin - j * VL), part[j]);
      }
      for (long j = 0; begin + j * VL < end; j++)
        for (int k = 0; k < SUMS; k++) sums[j][k] += part[j][k];
    }
    for (long j = 0; begin + j * VL < end; j++)
      for (int k = 0; k < SUMS; k++)
        put(to[k] + image * images.step + begin + j * VL, sums[j][k], std::min<long>(VL, end - begin - j * VL));
  });
}

// Of y = scale * LayerNorm(x) + shift: dx, (rows, width), plus `added` of that shape, if given; rows of dshift, dscale.
void gradient_of_norm(const float* dy, const float* x, const float* scale, float eps, const float* added, float* dx,
                      float* dshift, float* dscale, Images images, long width) {
  const long rows = images.count * images.rows;
  const std::unique_ptr<float[]> moments(new float[2 * rows]);  // mean and inverse deviation
  parallel((rows + 15) / 16, [&](long task) {
    for (long row = task * 16; row < std::min(rows, task * 16 + 16); row++) {
      const float *value = x + row * width, *slope = dy + row * width;
      const float* factor = scale + row / images.rows * images.step;
      const float mean = sum(width, [&](long i, long n) { return get(value + i, n); }) / width;
      const float squares = sum(width, [&](long i, long n) {
        const V centred = masked(get(value + i, n) - mean, n);
        return centred * centred;
      });
      const float inverse = 1.0f / std::sqrt(squares / width + eps);
      const float slopes = sum(width, [&](long i, long n) { return get(slope + i, n) * get(factor + i, n); }) / width;
      const float product =
          sum(width,
              [&](long i, long n) { return get(slope + i, n) * get(factor + i, n) * (get(value + i, n) - mean); }) *
          inverse / width;
      for (long i = 0; i < width; i += VL) {
        const long n = std::min<long>(VL, width - i), place = row * width + i;
        const V out = (get(value + i, n) - mean) * inverse;
        const V gradient = (get(slope + i, n) * get(factor + i, n) - slopes - out * product) * inverse;
        put(dx + place, added ? get(added + place, n) + gradient : gradient, n);
      }
      moments[2 * row] = mean;
      moments[2 * row + 1] = inverse;
    }
  });
  sum_columns<2>(images, width, {dshift, dscale}, [&](long row, long place, long n, V* sums) {
    const V slope = get(dy + place, n);
    sums[0] += slope;
    sums[1] += slope * ((get(x + place, n) - moments[2 * row]) * moments[2 * row + 1]);
  });
}

}  // namespace

Linear to_input(const float* dy, const float* weight, float* dx, long rows, long in, long out) {
  Linear l{};
  l.x = dy;
  l.weight = weight;
  l.turned = 1;
  l.y = dx;
  l.rows = l.rows_of_image = rows;
  l.in = l.x_step = out;
  l.out = in;
  return l;
}

void gradient_of_weight(const float* dy, const float* x, Affine<float> to, long rows, long in, long out) {
  if (!to.weight) return;
  multiply_together(out, in, rows, {dy, out, true}, {x, in}, to.weight, in);
  sum_columns<1>({1, rows, 0}, out, {to.bias},
                 [&](long, long place, long n, V* sums) { sums[0] += get(dy + place, n); });
}

void gradient_of_gate(const float* dy, const float* x, const float* gate, float* dx, float* dgate, Images images,
                      long width) {
  sum_columns<1>(images, width, {dgate}, [&](long row, long place, long n, V* sums) {
    const V slope = get(dy + place, n), factor = get(gate + row / images.rows * images.step + place % width, n);
    sums[0] += slope * get(x + place, n);
    put(dx + place, slope * factor, n);
  });
}

void gradient_of_modulated(const ModulatedGradient& g, float* spare) {
  const long rows = g.images.count * g.images.rows;
  float *normalised = spare, *between = spare + rows * g.in;
  Linear l{};
  l.x = g.x;
  l.rows = rows;
  l.in = l.x_step = g.in;
  l.rows_of_image = g.images.rows;
  l.step = g.images.step;
  l.shift = g.rows;
  l.scale = g.rows + g.in;
  l.eps = g.eps;
  if (g.to.weight) {
    normalise(l, 0, rows, normalised);
    gradient_of_weight(g.dy, normalised, g.to, rows, g.in, g.out);
  }
  apply(to_input(g.dy, g.weight, between, rows, g.in, g.out));
  gradient_of_norm(between, g.x, l.scale, g.eps, g.added, g.dx, g.drows, g.drows + g.in, g.images, g.in);
}

// The products of a linear map's backward pass are linear maps themselves; sums over rows run stripe by stripe.
#include "gradients.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "linear.h"
#include "pool.h"
#include "vector.h"

namespace {

constexpr long STRIPE = 64;  // rows or columns of a task
constexpr long SUMMED = 128;  // rows that are summed one after the other before their sum joins the others

// The first n elements of v, then zeros.
V masked(V v, long n) {
  for (long i = n; i < VL; i++) v[i] = 0;
  return v;
}

// Sum of what f(i, n) gives for the n <= VL columns from i on.
template <class F>
float sum(long width, F f) {
  V total = {};
  for (long i = 0; i < width; i += VL) total += f(i, std::min<long>(VL, width - i));
  return sum_of(total);
}

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

// to (columns, rows) = the transpose of x (rows, columns).
void turn(const float* x, float* to, long rows, long columns) {
  parallel((rows + STRIPE - 1) / STRIPE, [&](long task) {
    const long begin = task * STRIPE, end = std::min(rows, begin + STRIPE);
    for (long column = 0; column < columns; column += VL) {
      long row = begin;
      if (column + VL <= columns) {
        for (; row + VL <= end; row += VL) {
          V square[VL];
#pragma GCC unroll 16
          for (int i = 0; i < VL; i++) square[i] = load(x + (row + i) * columns + column);
          transpose(square);
#pragma GCC unroll 16
          for (int i = 0; i < VL; i++) store(to + (column + i) * rows + row, square[i]);
        }
      }
      for (; row < end; row++)
        for (long c = column; c < std::min(columns, column + VL); c++) to[c * rows + row] = x[row * columns + c];
    }
  });
}

Linear product(const float* x, const float* weight, float* y, long rows, long in, long out) {
  Linear l{};
  l.x = x;
  l.weight = weight;
  l.turned = true;
  l.y = y;
  l.rows = l.rows_of_image = rows;
  l.in = in;
  l.out = out;
  return l;
}

}  // namespace

void gradient_of_input(const float* dy, const float* weight, float* dx, long rows, long in, long out,
                       const float* added) {
  Linear l = product(dy, weight, dx, rows, out, in);
  l.residual = added;
  apply(l);
}

void gradient_of_gelu_input(const float* dy, const float* weight, const float* h, float* dh, float* activated,
                            long rows, long in, long out) {
  Linear l = product(dy, weight, dh, rows, out, in);
  l.gelu_input = h;
  l.gelu_output = activated;
  apply(l);
}

void gradient_of_weight(const float* dy, const float* x, float* dw, long rows, long in, long out) {
  // The narrower of the two factors is turned, and the result, if it comes out so.
  if (out <= in) {
    float* turned = scratch(2, rows * out);
    turn(dy, turned, rows, out);
    apply(product(turned, x, dw, out, rows, in));
    return;
  }
  float *turned = scratch(2, rows * in + in * out), *result = turned + rows * in;
  turn(x, turned, rows, in);
  apply(product(turned, dy, result, in, rows, out));
  turn(result, dw, in, out);
}

void gradient_of_bias(const float* dy, float* db, long rows, long out) {
  sum_columns<1>({1, rows, 0}, out, {db}, [&](long, long place, long n, V* sums) { sums[0] += get(dy + place, n); });
}

void gradient_of_gate(const float* dy, const float* x, const float* gate, float* dx, float* dgate, Images images,
                      long width) {
  sum_columns<1>(images, width, {dgate}, [&](long row, long place, long n, V* sums) {
    const V slope = get(dy + place, n), factor = get(gate + row / images.rows * images.step + place % width, n);
    sums[0] += slope * get(x + place, n);
    put(dx + place, slope * factor, n);
  });
}

void gradient_of_norm(const float* dy, const float* x, const float* scale, float eps, const float* added, float* dx,
                      float* dshift, float* dscale, Images images, long width) {
  const long rows = images.count * images.rows;
  const std::unique_ptr<float[]> moments(new float[2 * rows]);  // mean and inverse deviation
  parallel((rows + 15) / 16, [&](long task) {
    for (long row = task * 16; row < std::min(rows, task * 16 + 16); row++) {
      const float *value = x + row * width, *slope = dy + row * width;
      const float* factor = scale + row / images.rows * images.step;
      const float mean = sum(width, [&](long i, long n) { return get(value + i, n); }) / width;
      const float variance = sum(width, [&](long i, long n) {
        const V centred = masked(get(value + i, n) - mean, n);
        return centred * centred;
      }) / width;
      const float inverse = 1.0f / std::sqrt(variance + eps);
      const float slopes = sum(width, [&](long i, long n) { return get(slope + i, n) * get(factor + i, n); }) / width;
      const float product = sum(width, [&](long i, long n) {
        return get(slope + i, n) * get(factor + i, n) * (get(value + i, n) - mean);
      }) * inverse / width;
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

void gradient_of_modulated(const ModulatedGradient& g, float* spare) {
  const long rows = g.images.count * g.images.rows;
  float *normalised = spare, *between = spare + rows * g.in;
  Linear l{};
  l.x = g.x;
  l.rows = rows;
  l.in = g.in;
  l.rows_of_image = g.images.rows;
  l.step = g.images.step;
  l.shift = g.rows;
  l.scale = g.rows + g.in;
  l.eps = g.eps;
  normalise(l, normalised);
  gradient_of_weight(g.dy, normalised, g.dweight, rows, g.in, g.out);
  gradient_of_bias(g.dy, g.dbias, rows, g.out);
  gradient_of_input(g.dy, g.weight, between, rows, g.in, g.out);
  gradient_of_norm(between, g.x, l.scale, g.eps, g.added, g.dx, g.drows, g.drows + g.in, g.images, g.in);
}

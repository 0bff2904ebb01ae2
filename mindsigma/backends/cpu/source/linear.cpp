// What comes before and after a product runs over rows, or over the tiles of the product while they are near.
#include "linear.h"

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "products.h"
#include "vector.h"

namespace {

constexpr long CHUNK = 4096;  // rows that are normalised before they are multiplied

void normalise_row(const Linear& l, long row, float* to) {
  const float* x = l.x + row * l.x_step;
  const float mean = l.scale ? sum(l.in, [&](long i, long n) { return get(x + i, n); }) / l.in : 0.0f;
  const float squares = sum(l.in, [&](long i, long n) {
    const V d = masked(get(x + i, n) - mean, n);
    return d * d;
  });
  const float inverse = 1.0f / std::sqrt(squares / l.in + l.eps);
  const long place = row / l.rows_of_image * l.step;
  each_vector(l.in, [&](long i, long n) {
    const V v = (get(x + i, n) - mean) * inverse;
    put(to + i, l.scale ? v * get(l.scale + place + i, n) + get(l.shift + place + i, n) : v * get(l.norm_weight + i, n),
        n);
  });
}

// What comes after the product of a tile, whose rows begin with `first`.
void finish(const Linear& l, const Tile& tile, long first) {
  const bool activated = l.gelu;
  for (long row = first + tile.row; row < first + tile.row + tile.rows; row++) {
    const long start = row * l.out + tile.column;
    const auto from = [&](const float* p, long offset) { return p ? p + offset : nullptr; };
    const float *bias = from(l.bias, tile.column), *factor = from(l.factor, start), *residual = from(l.residual, start);
    const float *gate = from(l.gate, row / l.rows_of_image * l.step + tile.column), *h = from(l.gelu_input, start);
    float *y = l.y + start, *kept = l.kept ? l.kept + start : nullptr, *output = l.gelu_output + start;
    each_vector(tile.columns, [=](long i, long n) {
      V v = get(y + i, n), value;
      if (bias) v += get(bias + i, n);
      if (kept) put(kept + i, v, n);
      if (activated) v = gelu(v);
      if (h) {
        v *= gelu_slope(get(h + i, n), value);
        put(output + i, value, n);
      }
      if (factor) v *= get(factor + i, n);
      if (gate) v *= get(gate + i, n);
      if (residual) v += get(residual + i, n);
      put(y + i, v, n);
    });
  }
}

}  // namespace

void normalise(const Linear& l, long begin, long end, float* to) {
  parallel((end - begin + 15) / 16, [&](long task) {
    const long first = begin + task * 16;
    for (long row = first; row < std::min(end, first + 16); row++) normalise_row(l, row, to + (row - begin) * l.in);
  });
}

void apply(const Linear& l) {
  const bool norm = l.scale || l.norm_weight;
  for (long start = 0; start < l.rows; start += CHUNK) {
    const long rows = std::min(CHUNK, l.rows - start);
    Matrix x{l.x + start * l.x_step, l.x_step};
    if (norm) {
      float* normalised = scratch(0, rows * l.in);
      normalise(l, start, start + rows, normalised);
      x = {normalised, l.in};
    }
    multiply_together(rows, l.out, l.in, x, {l.weight, l.turned ? l.out : l.in, !l.turned}, l.y + start * l.out, l.out,
                      [&](const Tile& tile) { finish(l, tile, start); });
  }
}

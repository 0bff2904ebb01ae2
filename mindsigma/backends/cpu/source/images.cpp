// Group normalisation with its activation in one pass, and convolutions as products with the pixels that each one sees.
#include "images.h"

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "products.h"
#include "vector.h"

void group_norm(const float* x, const float* weight, const float* bias, float* y, long batch, long channels,
                long pixels, long groups, float eps, bool activate) {
  const long each = channels / groups, size = each * pixels;
  constexpr long PIECE = 2048;
  parallel(batch * groups, [&](long task) {
    const float* from = x + task * size;
    double total = 0, squares = 0;  // sums of the sums of pieces
    const auto each_piece = [&](auto f) {
      for (long start = 0; start < size; start += PIECE) f(from + start, std::min(PIECE, size - start));
    };
    each_piece([&](const float* p, long count) { total += sum(count, [&](long i, long n) { return get(p + i, n); }); });
    const float mean = total / size;
    each_piece([&](const float* p, long count) {
      squares += sum(count, [&](long i, long n) {
        const V d = masked(get(p + i, n) - mean, n);
        return d * d;
      });
    });
    const float inverse = 1.0 / std::sqrt(squares / size + eps);
    for (long c = 0; c < each; c++) {
      const long channel = task % groups * each + c;
      const float scale = inverse * weight[channel], shift = bias[channel];
      const float* in = from + c * pixels;
      float* to = y + task * size + c * pixels;
      each_vector(pixels, [&](long i, long n) {
        const V v = (get(in + i, n) - mean) * scale + shift;
        put(to + i, activate ? silu(v) : v, n);
      });
    }
  });
}

void read_pixels(const Convolution& c, const float* channel, long row, long column, long count, float* to) {
  if (row < 0 || row >= c.height) {
    std::fill(to, to + count, 0.0f);
    return;
  }
  const long begin = std::clamp<long>(-column, 0, count), end = std::clamp<long>(c.width - column, begin, count);
  std::fill(to, to + begin, 0.0f);
  const float* line = channel + (c.enlarge ? row / 2 * (c.width / 2) : row * c.width);
  if (c.enlarge)
    for (long j = begin; j < end; j++) to[j] = line[(column + j) / 2];
  else
    std::copy(line + column + begin, line + column + end, to + begin);
  std::fill(to + end, to + count, 0.0f);
}

namespace {

constexpr long DEPTH = 384;   // of a product: channels of x, times taps
constexpr long PIXELS = 512;  // of a task, at most

// The values that a tap sees of `count` pixels from `first` on.
void see(const Convolution& c, const float* channel, long down, long across, long first, long count, float* to) {
  for (long pixel = first; pixel < first + count;) {
    const long row = pixel / c.width, column = pixel % c.width,
               some = std::min(c.width - column, first + count - pixel);
    read_pixels(c, channel, row + down, column + across, some, to + pixel - first);
    pixel += some;
  }
}

}  // namespace

void convolve(const Convolution& c) {
  if (points_pay(c)) return convolve_by_points(c);
  const long pixels = c.height * c.width, taps = c.side * c.side, border = c.side / 2, together = DEPTH / taps;
  const long most = std::clamp<long>((pixels / (2 * thread_count()) + 15) / 16 * 16, 64, PIXELS);
  const long groups = (pixels + most - 1) / most;
  parallel(c.batch * groups, [&](long task) {
    const long image = task / groups, first = task % groups * most, count = std::min(most, pixels - first);
    float *seen = scratch(1, DEPTH * count), *y = c.y + image * c.out * pixels + first;
    for (long start = 0; start < c.in; start += together) {
      const long channels = std::min(together, c.in - start);
      float* to = seen;
      for (long i = 0; i < channels; i++)
        for (long u = -border; u <= border; u++)
          for (long v = -border; v <= border; v++, to += count)
            see(c, c.channel(image, start + i), u, v, first, count, to);
      multiply(c.out, count, channels * taps, {c.weight + start * taps, c.in * taps}, {seen, count}, y, pixels, 1,
               start > 0);
    }
    for (long out = 0; out < c.out; out++) {
      const float* residual = c.residual ? c.residual + (image * c.out + out) * pixels + first : nullptr;
      each_vector(count, [&](long i, long n) {
        const V v = get(y + out * pixels + i, n) + c.bias[out];
        put(y + out * pixels + i, residual ? v + get(residual + i, n) : v, n);
      });
    }
  });
}

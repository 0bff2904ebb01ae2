// Group normalisation with its activation in one pass, and convolutions as products of packed pixels.
#include "images.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pixels.h"
#include "pool.h"
#include "tile.h"

void group_norm(const float* x, const float* weight, const float* bias, float* y, long batch, long channels,
                long pixels, long groups, float eps, bool activate) {
  const long each = channels / groups, size = each * pixels;
  constexpr long PIECE = 2048;
  parallel(batch * groups, [&](long task) {
    const float* from = x + task * size;
    double mean = 0, squares = 0;  // of the pieces so far; they are combined as in Chan, Golub, LeVeque (1983)
    for (long start = 0; start < size; start += PIECE) {
      const long count = std::min(PIECE, size - start), whole = count / VL * VL;
      const float* p = from + start;
      V sum = {};
      for (long i = 0; i < whole; i += VL) sum += load(p + i);
      float total = sum_of(sum);
      for (long i = whole; i < count; i++) total += p[i];
      const float middle = total / count;
      V deviations = {};
      for (long i = 0; i < whole; i += VL) {
        V d = load(p + i) - middle;
        deviations += d * d;
      }
      double own = sum_of(deviations);
      for (long i = whole; i < count; i++) own += (p[i] - middle) * (p[i] - middle);
      const double difference = middle - mean;
      squares += own + difference * difference * (double(start) * count / (start + count));
      mean += difference * count / (start + count);
    }
    const float inverse = 1.0 / std::sqrt(squares / size + eps);
    for (long c = 0; c < each; c++) {
      const long channel = task % groups * each + c;
      const float scale = inverse * weight[channel], shift = bias[channel], middle = mean;
      const float* in = from + c * pixels;
      float* to = y + task * size + c * pixels;
      for (long i = 0; i < pixels; i += VL) {
        const long n = std::min<long>(VL, pixels - i);
        const V v = (get(in + i, n) - middle) * scale + shift;
        put(to + i, activate ? silu(v) : v, n);
      }
    }
  });
}

namespace {

constexpr long DEPTH = 288;  // of a packed block: channels of x, times taps
constexpr long PIXELS = 8;   // panels of NR pixels in a task

template <int N>
void tile(const Convolution& c, const float* a, long stride, const float* panel, long depth, bool first, bool last,
          long image, long channel, long height, long pixel, long width) {
  V acc[MR][N];
  multiply<N>(a, stride, panel, depth, acc);
  for (int i = 0; i < height; i++) {
    const long place = (image * c.out + channel + i) * c.height * c.width + pixel;
    for (int j = 0; j < N; j++) {
      const long at = place + j * VL, left = std::min<long>(VL, width - j * VL);
      V v = acc[i][j];
      if (!first) v += get(c.y + at, left);
      if (last) {
        v += c.bias[channel + i];
        if (c.residual) v += get(c.residual + at, left);
      }
      put(c.y + at, v, left);
    }
  }
}

}  // namespace

void convolve(const Convolution& c) {
  if (points_pay(c)) return convolve_by_points(c);
  const long across = (c.width + NR - 1) / NR, panels = across * c.height;  // a panel is a piece of a row
  const long most = std::clamp<long>(panels / (2 * thread_count()), 1, PIXELS);
  const long groups = (panels + most - 1) / most;
  const long filled = (c.out + MR - 1) / MR * MR, taps = c.side * c.side, border = c.side / 2;
  std::vector<float> extra;  // the weight with rows of zeros after it
  const float* weight = c.weight;
  if (filled != c.out) {
    extra.assign(filled * c.in * taps, 0.0f);
    std::copy(c.weight, c.weight + c.out * c.in * taps, extra.begin());
    weight = extra.data();
  }
  parallel(c.batch * groups, [&](long task) {
    const long image = task / groups, begin = task % groups * most, count = std::min(most, panels - begin);
    float* packed = scratch(1, most * DEPTH * NR);
    for (long start = 0; start < c.in; start += DEPTH / taps) {
      const long channels = std::min(DEPTH / taps, c.in - start), depth = channels * taps;
      for (long p = 0; p < count; p++) {
        const long row = (begin + p) / across, column = (begin + p) % across * NR;
        float* to = packed + p * DEPTH * NR;
        for (long i = 0; i < channels; i++) {
          const float* channel = c.channel(image, start + i);
          for (long u = -border; u <= border; u++)
            for (long v = -border; v <= border; v++, to += NR) read_pixels<NR>(c, channel, row + u, column + v, to);
        }
      }
      const bool first = start == 0, last = start + channels == c.in;
      for (long channel = 0; channel < c.out; channel += MR) {
        const float* a = weight + (channel * c.in + start) * taps;
        const long height = std::min<long>(MR, c.out - channel), stride = c.in * taps;
        for (long p = 0; p < count; p++) {
          const long row = (begin + p) / across, column = (begin + p) % across * NR;
          const long width = std::min<long>(NR, c.width - column), pixel = row * c.width + column;
          const float* panel = packed + p * DEPTH * NR;
          if (width > 2 * VL)
            tile<3>(c, a, stride, panel, depth, first, last, image, channel, height, pixel, width);
          else if (width > VL)
            tile<2>(c, a, stride, panel, depth, first, last, image, channel, height, pixel, width);
          else
            tile<1>(c, a, stride, panel, depth, first, last, image, channel, height, pixel, width);
        }
      }
    }
  });
}

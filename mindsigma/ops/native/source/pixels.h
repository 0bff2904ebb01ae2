// Rows of pixels of what is convolved.
#pragma once
#include <algorithm>

#include "images.h"
#include "vector.h"

// COUNT pixels, a multiple of VL, from `column` on of a row of a channel, enlarged if need be; zeros outside.
template <long COUNT>
inline void read_pixels(const Convolution& c, const float* channel, long row, long column, float* to) {
  if (row < 0 || row >= c.height) {
    for (long j = 0; j < COUNT; j += VL) store(to + j, V{});
    return;
  }
  if (c.enlarge) {
    const float* line = channel + row / 2 * (c.width / 2);
    for (long j = 0; j < COUNT; j++) {
      const long place = column + j;
      to[j] = place < 0 || place >= c.width ? 0.0f : line[place / 2];
    }
    return;
  }
  const float* line = channel + row * c.width;
  if (column >= 0 && column + COUNT <= c.width) {
    for (long j = 0; j < COUNT; j += VL) store(to + j, load(line + column + j));
    return;
  }
  const long begin = std::clamp<long>(-column, 0, COUNT), end = std::clamp<long>(c.width - column, begin, COUNT);
  std::fill(to, to + begin, 0.0f);
  std::copy(line + column + begin, line + column + end, to + begin);
  std::fill(to + end, to + COUNT, 0.0f);
}

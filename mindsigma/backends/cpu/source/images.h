// What a VAE does to images (channels, height, width).
#pragma once

// y = silu(GroupNorm(x)) or, without `activate`, GroupNorm(x); x (batch, channels, pixels).
void group_norm(const float* x, const float* weight, const float* bias, float* y, long batch, long channels,
                long pixels, long groups, float eps, bool activate);

// 1x1 or 3x3 convolution with stride 1 and a border of zeros, plus bias, plus residual if given. With `enlarge` of the
// image with every pixel repeated twice along both axes. x (batch, in, height, width), y (batch, out, height', width').
struct Convolution {
  const float* x;
  const float* weight;  // (out, in, side, side)
  const float *bias, *residual;
  float* y;
  long batch, in, out, height, width;  // of y
  long side;                           // 1 or 3
  long enlarge;

  const float* channel(long image, long i) const { return x + (image * in + i) * height * width / (enlarge ? 4 : 1); }
};

void convolve(const Convolution& convolution);

// `count` pixels from `column` on of a row of a channel, enlarged if need be; zeros outside.
void read_pixels(const Convolution& c, const float* channel, long row, long column, long count, float* to);

// The same convolution of side 3 with fewer multiplications, and whether that is the faster way.
void convolve_by_points(const Convolution& convolution);
bool points_pay(const Convolution& convolution);

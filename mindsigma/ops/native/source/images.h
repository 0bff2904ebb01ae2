// What a VAE does to images (channels, height, width).
#pragma once

// y = silu(GroupNorm(x)) or, without `activate`, GroupNorm(x); x (batch, channels, pixels).
void group_norm(const float* x, const float* weight, const float* bias, float* y, long batch, long channels,
                long pixels, long groups, float eps, bool activate);

// 3x3 convolution with stride 1 and a border of zeros, plus bias, plus residual if given. With `enlarge` of the image
// with every pixel repeated twice along both axes. x (batch, in, height, width), y (batch, out, height', width').
struct Convolution {
  const float* x;
  const float* weight;  // (out, in, 3, 3)
  const float* bias;
  const float* residual;
  float* y;
  long batch, in, out, height, width;  // of y
  bool enlarge;
};

void convolve(const Convolution& convolution);

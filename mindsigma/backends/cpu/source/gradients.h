// Gradients of linear maps and what goes with them, from those of what a part gives, dy. Rows of an image share a row
// of modulation; `step` floats lie between those of two images.
#pragma once
#include "linear.h"

template <class T>
struct Affine {
  T *weight, *bias;
};

struct Images {
  long count, rows;  // rows of each
  long step;
};

// Of a linear map y = x w^T + bias of x (rows, in): the linear map of dy (rows, out) whose result is dx.
Linear to_input(const float* dy, const float* weight, float* dx, long rows, long in, long out);

// Of its weight (out, in) and bias (out,); to null pointers none.
void gradient_of_weight(const float* dy, const float* x, Affine<float> to, long rows, long in, long out);

// Of y = gate * x: dx = gate * dy, (rows, width), and a row of dgate for each image.
void gradient_of_gate(const float* dy, const float* x, const float* gate, float* dx, float* dgate, Images images,
                      long width);

// Of y = (scale * LayerNorm(x) + shift) w^T + bias; weight (out, in), `rows` and `drows` a row of shifts and one of
// scales after it for each image. dx is (rows, in), plus `added` of that shape, if given. `to` may be null pointers.
struct ModulatedGradient {
  const float *dy, *x, *rows, *weight, *added;
  float *dx, *drows;
  Affine<float> to;
  long in, out;
  float eps;
  Images images;
};

// `spare` is memory for 2 * rows * in floats.
void gradient_of_modulated(const ModulatedGradient& gradient, float* spare);

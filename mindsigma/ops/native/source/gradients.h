// Gradients of the parts of a block, from those of what a part gives, dy. Rows of an image share a row of modulation;
// `step` floats lie between those of two images.
#pragma once

struct Images {
  long count, rows;  // rows of each
  long step;
};

// Of a linear map y = x w^T + bias of x (rows, in), dy (rows, out).

// dy w: (rows, in), plus `added` of that shape, if given; w (out, in).
void gradient_of_input(const float* dy, const float* weight, float* dx, long rows, long in, long out,
                       const float* added = nullptr);

// The same for the input gelu(h): its gradient with respect to h, (rows, in), and gelu(h) itself.
void gradient_of_gelu_input(const float* dy, const float* weight, const float* h, float* dh, float* activated,
                            long rows, long in, long out);

// dy^T x: (out, in).
void gradient_of_weight(const float* dy, const float* x, float* dw, long rows, long in, long out);

// Sums of the columns of dy: (out,).
void gradient_of_bias(const float* dy, float* db, long rows, long out);

// Of y = gate * x: dx = gate * dy, (rows, width), and a row of dgate for each image.
void gradient_of_gate(const float* dy, const float* x, const float* gate, float* dx, float* dgate, Images images,
                      long width);

// Of y = scale * LayerNorm(x) + shift: dx, (rows, width), plus `added` of that shape, if given; rows of dshift, dscale.
void gradient_of_norm(const float* dy, const float* x, const float* scale, float eps, const float* added, float* dx,
                      float* dshift, float* dscale, Images images, long width);

// Of y = (scale * LayerNorm(x) + shift) w^T + bias; weight (out, in), `rows` and `drows` a row of shifts and one of
// scales after it for each image. dx is (rows, in), plus `added` of that shape, if given.
struct ModulatedGradient {
  const float *dy, *x, *rows, *weight, *added;
  float *dx, *drows, *dweight, *dbias;
  long in, out;
  float eps;
  Images images;
};

// `spare` is memory for 2 * rows * in floats.
void gradient_of_modulated(const ModulatedGradient& gradient, float* spare);

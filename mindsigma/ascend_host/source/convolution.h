// Convolution of images as products of their columns, a few rows of the output at a time.
#pragma once

#include "cube.h"

struct Convolution {
  int64_t images, channels, height, width;            // of the input
  int64_t filters, kernel_height, kernel_width;
  int64_t out_height, out_width;
  int64_t stride_y, stride_x, top, bottom, left, right, dilation_y, dilation_x, groups;

  int64_t depth() const { return channels / groups * kernel_height * kernel_width; }  // of a column
  int64_t rows_at_once() const;                       // so that the columns of a piece stay small
};

// Lists are of CANN: two strides, two dilations, two or four pads (top, bottom, left, right).
Convolution convolution_of(const Shape &input, const Shape &weight, const Shape &strides, const Shape &pads,
                           const Shape &dilations, int64_t groups);

void convolve(const Convolution &c, const aclTensor *x, const aclTensor *weight, const aclTensor *bias, aclTensor *out,
              int dtype, int8_t math);

// Gradients in float32 of what is not null: dx (images, channels, height, width), dweight of the weight's shape.
void convolve_back(const Convolution &c, const aclTensor *dy, const aclTensor *x, const aclTensor *weight, int dtype,
                   int8_t math, std::vector<float> *dx, std::vector<float> *dweight);

// Numbers of tensors: read in the order of the shape, whatever the strides, and written back rounded once.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "cann.h"

int64_t elements(const Shape &shape);
inline int64_t elements(const aclTensor *tensor) { return elements(tensor->shape); }
size_t item_size(int dtype);
bool is_float(int dtype);    // float32, halves, double
bool is_whole(int dtype);    // integers and truth values
bool contiguous(const aclTensor *tensor);

// A dimension counted from either end, refused when there is none of that number.
int64_t axis_of(int64_t axis, size_t rank, const char *name);

// Shape to which both are broadcast; refuses two that do not fit.
Shape broadcast(const Shape &a, const Shape &b);

// Offsets in elements of everything in `shape`, in order, for a tensor that is broadcast to it.
std::vector<int64_t> offsets(const aclTensor *tensor, const Shape &shape);

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);      // to nearest, ties to even
float bfloat_to_float(uint16_t bits);
uint16_t float_to_bfloat(float value);    // to nearest, ties to even

// Elements of a tensor, or of a tensor broadcast to a shape, as T: float, double or int64_t.
template <class T>
std::vector<T> read(const aclTensor *tensor);
template <class T>
std::vector<T> read(const aclTensor *tensor, const Shape &shape);

// Write T, rounded to the tensor's dtype: halves to nearest even, integers as C++ converts, truth values from not zero.
template <class T>
void write(aclTensor *tensor, const std::vector<T> &values);

template <class T>
T value(const aclScalar *scalar);  // 1 for null, as CANN takes alpha

// Copy items unchanged: `to` has the same dtype, and `from` is broadcast to its shape.
void copy_items(const aclTensor *from, aclTensor *to);

// A tensor of the same memory, seen as something else.
aclTensor view(const aclTensor *tensor, const Shape &shape, const Shape &strides, int64_t offset);
Shape packed_strides(const Shape &shape);

// The dtype in which an operator of these computes: double if one is, int64_t if all are whole, else float.
template <class F>
auto in_wide_type(std::initializer_list<int> dtypes, F compute) {
  bool whole = true, wide = false;
  for (int dtype : dtypes) {
    whole = whole && is_whole(dtype);
    wide = wide || dtype == F64;
  }
  if (wide) return compute(double());
  if (whole) return compute(int64_t());
  return compute(float());
}

// Rows at once over the cores: body(begin, end).
void in_parallel(int64_t rows, int64_t cost_of_row, const std::function<void(int64_t, int64_t)> &body);

// c (m, n) = alpha * op(a) op(b) + beta * c, all packed, fp32, by the product of MindSpore's own oneDNN.
void multiply(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
              const float *b, float beta, float *c);

// What the cube unit does to its operands: products are of halves or of float32, which a setting may narrow first.
#pragma once

#include "arrays.h"

// Values of cubeMathType.
enum CubeMath : int8_t { KEEP_DTYPE = 0, ALLOW_FP32_DOWN_PRECISION = 1, USE_FP16 = 2, USE_HF32 = 3, USE_FP32_ADD = 4 };

// The dtype in which two operands meet: halves widen to float32; bfloat16 meets only itself on this processor.
int cube_dtype(const aclTensor *a, const aclTensor *b);

void require_cube_math(int8_t math);

// HFLOAT32: float32 with 11 bits of fraction, to nearest.
float float_to_hf32(float value);

// Narrow the operands of a product in float32 as cubeMathType says. Halves stay what they are.
void narrow(std::vector<float> &values, int dtype, int8_t math);

// A tensor's matrices (..., m, k), packed; a transposed view stays as it lies and is told.
struct Matrices {
  std::vector<float> values;
  bool transposed;
};
Matrices matrices(const aclTensor *tensor, int dtype, int8_t math);

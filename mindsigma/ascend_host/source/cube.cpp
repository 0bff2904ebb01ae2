// Operands of the cube unit.
#include "cube.h"

int cube_dtype(const aclTensor *a, const aclTensor *b) {
  if (a->dtype == b->dtype) return a->dtype;
  require(a->dtype != BF16 && b->dtype != BF16, "%s meets %s; CANN multiplies bfloat16 by bfloat16 alone here",
          dtype_name(a->dtype), dtype_name(b->dtype));
  return F32;
}

void require_cube_math(int8_t math) {
  require(math >= KEEP_DTYPE && math <= USE_FP32_ADD, "cubeMathType is %d; CANN takes 0 to 4", math);
}

float float_to_hf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (!std::isfinite(value)) return value;
  bits = (bits + 0x7ff + (bits >> 12 & 1)) & ~0xfffu;
  std::memcpy(&value, &bits, 4);
  return value;
}

void narrow(std::vector<float> &values, int dtype, int8_t math) {
  if (dtype != F32 || math == KEEP_DTYPE || math == USE_FP32_ADD) return;
  if (math == USE_FP16)
    for (float &value : values) value = half_to_float(float_to_half(value));
  else
    for (float &value : values) value = float_to_hf32(value);
}

Matrices matrices(const aclTensor *tensor, int dtype, int8_t math) {
  aclTensor turned = *tensor;
  size_t rank = turned.shape.size();
  std::swap(turned.shape[rank - 1], turned.shape[rank - 2]);
  std::swap(turned.strides[rank - 1], turned.strides[rank - 2]);
  bool transposed = !contiguous(tensor) && contiguous(&turned);
  Matrices result{read<float>(transposed ? &turned : tensor), transposed};
  narrow(result.values, dtype, math);
  return result;
}

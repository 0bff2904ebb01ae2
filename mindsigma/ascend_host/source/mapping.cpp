#include "mapping.h"

int promote(int a, int b) {
  if (a == b) return a;
  for (int dtype : {a, b})
    require(dtype != U16 && dtype != U32 && dtype != U64, "%s and %s have no common dtype in CANN", dtype_name(a),
            dtype_name(b));
  if (a == F64 || b == F64) return F64;
  if (is_float(a) && is_float(b)) return F32;  // two different halves as well
  if (is_float(a) || b == BOOL) return a;
  if (is_float(b) || a == BOOL) return b;
  if (item_size(a) == item_size(b)) return I16;  // int8 and uint8
  return item_size(a) > item_size(b) ? a : b;
}

int promote(const aclTensor *tensor, const aclScalar *scalar, const aclTensor *out) {
  if (is_float(tensor->dtype)) return tensor->dtype;
  if (scalar->dtype == F64 && out->dtype == F32) return F32;
  if (is_float(scalar->dtype) || tensor->dtype == BOOL) return promote(tensor->dtype, scalar->dtype);
  return tensor->dtype;
}

void require_castable(int dtype, const aclTensor *out, const char *name) {
  require(out->dtype != BOOL || dtype == BOOL, "%s is bool; CANN converts no %s to it", name, dtype_name(dtype));
}

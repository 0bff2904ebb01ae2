// Arithmetic of two and three operands: tensors are brought to CANN's common dtype, scalars are rounded to it.
#include "mapping.h"

namespace {

void require_numbers(const aclTensor *x, const aclTensor *y, Dtypes allowed) {
  require_dtype(x, "self", allowed);
  require_dtype(y, "other", allowed);
}

// f of two tensors.
template <class F>
Run pair(const aclTensor *x, const aclTensor *y, const aclTensor *out, Dtypes allowed, F f) {
  require_numbers(x, y, allowed);
  int common = promote(x->dtype, y->dtype);
  require_castable(common, out, "out");
  return combine(out, common, f, x, y);
}

// f of a tensor and a scalar.
template <class F>
Run pair(const aclTensor *x, const aclScalar *y, const aclTensor *out, Dtypes allowed, F f) {
  require_dtype(x, "self", allowed);
  aclScalar other = kept(y, "other");
  int common = promote(x, &other, out);
  require_castable(common, out, "out");
  return combine(out, common, f, x, other);
}

// x + alpha y or x - alpha y. y: a tensor or a scalar.
template <class Other, class F>
Run scaled(const aclTensor *x, Other other, int common, const aclScalar *alpha, const aclTensor *out, F f) {
  aclScalar factor = kept(alpha, "alpha");
  require(is_float(common) || !is_float(factor.dtype), "alpha is %s, the tensors are %s", dtype_name(factor.dtype),
          dtype_name(common));
  require_castable(common, out, "out");
  return combine(out, common, f, x, other, factor);
}
template <class F>
Run scaled(const aclTensor *x, const aclTensor *y, const aclScalar *alpha, const aclTensor *out, F f) {
  require_numbers(x, y, NUMBERS_AND_BOOL);
  return scaled(x, y, promote(x->dtype, y->dtype), alpha, out, f);
}
template <class F>
Run scaled(const aclTensor *x, const aclScalar *y, const aclScalar *alpha, const aclTensor *out, F f) {
  require_dtype(x, "self", NUMBERS_AND_BOOL);
  aclScalar other = kept(y, "other");
  return scaled(x, other, promote(x, &other, out), alpha, out, f);
}

constexpr auto PLUS = [](auto x, auto y, auto alpha) { return x + alpha * y; };
constexpr auto MINUS = [](auto x, auto y, auto alpha) { return x - alpha * y; };
constexpr auto TIMES = [](auto x, auto y) { return x * y; };
constexpr auto OVER = [](auto x, auto y) { return x / y; };
constexpr auto POWER = [](auto x, auto y) { return std::pow(x, y); };
// A NaN on either side stays one.
constexpr auto LARGER = [](auto x, auto y) { return x != x || x > y ? x : y; };
constexpr auto SMALLER = [](auto x, auto y) { return x != x || x < y ? x : y; };

Run times(const aclTensor *x, const aclScalar *y, const aclTensor *out) {
  require_dtype(x, "self", NUMBERS_AND_BOOL);
  aclScalar other = kept(y, "other");
  int common = promote(x, &other, out);
  require_castable(common, out, "out");
  if (x->dtype == BF16) common = F32;  // the scalar keeps its fp32; for fp16 it is rounded
  return combine(out, common, TIMES, x, other);
}

// Whole numbers are divided as fp32.
template <class Other>
Run quotient(const aclTensor *x, Other other, int common, const aclTensor *out) {
  common = is_float(common) ? common : F32;
  require_castable(common, out, "out");
  return combine(out, common, OVER, x, other);
}
Run over(const aclTensor *x, const aclTensor *y, const aclTensor *out) {
  require_numbers(x, y, NUMBERS_AND_BOOL);
  return quotient(x, y, promote(x->dtype, y->dtype), out);
}
Run over(const aclTensor *x, const aclScalar *y, const aclTensor *out) {
  require_dtype(x, "self", NUMBERS_AND_BOOL);
  return quotient(x, kept(y, "other"), x->dtype, out);
}

constexpr Dtypes FUSED{F32, F16, BF16, F64, I32, I64, I8, U8};
constexpr Dtypes DIVIDED{F32, F16, BF16, F64, I64};

template <class F>
Run fused(const aclTensor *x, const aclTensor *a, const aclTensor *b, const aclScalar *value, const aclTensor *out,
          Dtypes allowed, F f) {
  require_dtype(x, "self", allowed);
  require_dtype(a, "tensor1", allowed);
  require_dtype(b, "tensor2", allowed);
  int common = promote(x->dtype, promote(a->dtype, b->dtype));
  require_castable(common, out, "out");
  return combine(out, common, f, x, a, b, kept(value, "value"));
}

constexpr auto LERP = [](auto x, auto end, auto weight) { return x + weight * (end - x); };

}  // namespace

#define OF_TENSORS(NAME, RUN)                                                                \
  KERNEL(aclnn##NAME, const aclTensor *self, const aclTensor *other, aclTensor *out) { PLAN { return RUN; }; }
#define IN_PLACE(NAME, RUN)                                                                \
  KERNEL(aclnn##NAME, aclTensor *self, const aclTensor *other) { aclTensor *out = self; PLAN { return RUN; }; }
#define OF_SCALAR(NAME, RUN)                                                                 \
  KERNEL(aclnn##NAME, const aclTensor *self, const aclScalar *other, aclTensor *out) { PLAN { return RUN; }; }
#define IN_PLACE_SCALAR(NAME, RUN)                                                         \
  KERNEL(aclnn##NAME, aclTensor *self, const aclScalar *other) { aclTensor *out = self; PLAN { return RUN; }; }

OF_TENSORS(Mul, pair(self, other, out, NUMBERS_AND_BOOL, TIMES))
OF_SCALAR(Muls, times(self, other, out))
IN_PLACE(InplaceMul, pair(self, other, out, NUMBERS_AND_BOOL, TIMES))
IN_PLACE_SCALAR(InplaceMuls, times(self, other, out))
OF_TENSORS(Div, over(self, other, out))
OF_SCALAR(Divs, over(self, other, out))
IN_PLACE(InplaceDiv, over(self, other, out))
IN_PLACE_SCALAR(InplaceDivs, over(self, other, out))
OF_TENSORS(Maximum, pair(self, other, out, NUMBERS_AND_BOOL, LARGER))
OF_TENSORS(Minimum, pair(self, other, out, NUMBERS_AND_BOOL, SMALLER))
OF_TENSORS(PowTensorTensor, pair(self, other, out, NUMBERS_AND_BOOL, POWER))
OF_SCALAR(PowTensorScalar, pair(self, other, out, NUMBERS_AND_BOOL, POWER))

#define SCALED(NAME, F)                                                                                    \
  KERNEL(aclnn##NAME, const aclTensor *self, const aclTensor *other, const aclScalar *alpha, aclTensor *out) { \
    PLAN { return scaled(self, other, alpha, out, F); };                                                       \
  }                                                                                                            \
  KERNEL(aclnn##NAME##s, const aclTensor *self, const aclScalar *other, const aclScalar *alpha, aclTensor *out) { \
    PLAN { return scaled(self, other, alpha, out, F); };                                                       \
  }                                                                                                            \
  KERNEL(aclnnInplace##NAME, const aclTensor *self, const aclTensor *other, const aclScalar *alpha) {          \
    PLAN { return scaled(self, other, alpha, self, F); };                                                      \
  }                                                                                                            \
  KERNEL(aclnnInplace##NAME##s, const aclTensor *self, const aclScalar *other, const aclScalar *alpha) {       \
    PLAN { return scaled(self, other, alpha, self, F); };                                                      \
  }
SCALED(Add, PLUS)
SCALED(Sub, MINUS)

KERNEL(aclnnPowScalarTensor, const aclScalar *self, const aclTensor *exponent, const aclTensor *out) {
  PLAN {
    require_dtype(exponent, "exponent", NUMBERS_AND_BOOL);
    aclScalar base = kept(self, "self");
    int common = promote(exponent, &base, out);
    require_castable(common, out, "out");
    return combine(out, common, POWER, base, exponent);
  };
}

KERNEL(aclnnAddcmul, const aclTensor *self, const aclTensor *a, const aclTensor *b, const aclScalar *value,
       aclTensor *out) {
  PLAN {
    return fused(self, a, b, value, out, FUSED, [](auto x, auto p, auto q, auto v) { return x + v * p * q; });
  };
}

KERNEL(aclnnAddcdiv, const aclTensor *self, const aclTensor *a, const aclTensor *b, const aclScalar *value,
       const aclTensor *out) {
  PLAN {
    return fused(self, a, b, value, out, DIVIDED, [](auto x, auto p, auto q, auto v) { return x + v * p / q; });
  };
}

KERNEL(aclnnLerp, const aclTensor *self, const aclTensor *end, const aclTensor *weight, aclTensor *out) {
  PLAN {
    for (const aclTensor *tensor : {self, end, weight}) require_dtype(tensor, "an input", FLOATS);
    require_same_dtype(self, end, "self and end");
    return combine(out, promote(self->dtype, weight->dtype), LERP, self, end, weight);
  };
}

KERNEL(aclnnLerps, const aclTensor *self, const aclTensor *end, const aclScalar *weight, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", FLOATS);
    require_same_dtype(self, end, "self and end");
    return combine(out, self->dtype, LERP, self, end, kept(weight, "weight"));
  };
}

// Limits by scalars, either of which may be missing, and by tensors.
KERNEL(aclnnClamp, const aclTensor *self, const aclScalar *least, const aclScalar *most, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS);
    require(least || most, "both limits are missing");
    if (!least) return combine(out, self->dtype, SMALLER, self, *most);
    if (!most) return combine(out, self->dtype, LARGER, self, *least);
    return combine(out, self->dtype, [](auto x, auto a, auto b) { return SMALLER(LARGER(x, a), b); }, self, *least, *most);
  };
}

KERNEL(aclnnClampTensor, const aclTensor *self, const aclTensor *least, const aclTensor *most, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS);
    require(least || most, "both limits are missing");
    if (!least) return pair(self, most, out, NUMBERS, SMALLER);
    if (!most) return pair(self, least, out, NUMBERS, LARGER);
    int common = promote(self->dtype, promote(least->dtype, most->dtype));
    return combine(out, common, [](auto x, auto a, auto b) { return SMALLER(LARGER(x, a), b); }, self, least, most);
  };
}

// Whole numbers are floored towards minus infinity; the remainder has the divisor's sign.
namespace {
template <class T>
T floored(T x, T y) {
  if constexpr (std::is_integral_v<T>) {
    if (y == 0) return -1;  // not documented; a device gives some number
    return x / y - (x % y != 0 && (x < 0) != (y < 0));
  } else {
    return std::floor(x / y);
  }
}
constexpr auto FLOOR_DIVIDE = [](auto x, auto y) { return floored(x, y); };
constexpr auto REMAINDER = [](auto x, auto y) { return x - floored(x, y) * y; };
}  // namespace
OF_TENSORS(FloorDivide, pair(self, other, out, NUMBERS_AND_BOOL, FLOOR_DIVIDE))
OF_SCALAR(FloorDivides, pair(self, other, out, NUMBERS_AND_BOOL, FLOOR_DIVIDE))
OF_TENSORS(RemainderTensorTensor, pair(self, other, out, NUMBERS, REMAINDER))
OF_SCALAR(RemainderTensorScalar, pair(self, other, out, NUMBERS, REMAINDER))

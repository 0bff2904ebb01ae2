// Functions of one number: dtypes as CANN's pages list them, whole numbers computed in fp32.
#include "mapping.h"

namespace {

// The dtype in which a function with fractional results is computed.
int real(int dtype) { return is_float(dtype) ? dtype : F32; }

template <class F>
Run function(const aclTensor *x, aclTensor *out, Dtypes in, Dtypes to, F f) {
  require_dtype(x, "self", in);
  require_dtype(out, "out", to);
  require_rank(x, "self", 0, MOST_DIMENSIONS);
  return combine(out, real(x->dtype), f, x);
}

// Functions whose results have the dtype of the input.
template <class F>
Run same(const aclTensor *x, aclTensor *out, Dtypes in, F f) {
  require_dtype(x, "self", in);
  require_same_dtype(x, out, "self and out");
  require_rank(x, "self", 0, MOST_DIMENSIONS);
  return combine(out, x->dtype, f, x);
}

constexpr Dtypes EXPONENTS{F32, F16, BF16, F64, BOOL, I64};
constexpr Dtypes TANHS{F32, F16, BF16, BOOL, U8, I8, I16, I32, I64};
constexpr Dtypes NEGATED{F32, F16, BF16, F64, I8, I32, I64};
constexpr Dtypes SIGNED{F32, F16, BF16, F64, I32, I64, BOOL};
constexpr Dtypes RECTIFIED{F32, F16, BF16, I8, U8, I32, I64};
constexpr Dtypes STEPPED{F32, F16, BF16, F64, I8, U8, I16, U16, I32, U32, I64, U64};

}  // namespace

#define FUNCTION(NAME, IN, TO, FORMULA)                        \
  KERNEL(aclnn##NAME, const aclTensor *self, aclTensor *out) { \
    PLAN { return function(self, out, IN, TO, [](auto x) { return FORMULA; }); }; \
  }

FUNCTION(Exp, EXPONENTS, REALS, std::exp(x))
FUNCTION(Log, NUMBERS_AND_BOOL, REALS, std::log(x))
FUNCTION(Log2, NUMBERS_AND_BOOL, REALS, std::log2(x))
FUNCTION(Log1p, NUMBERS_AND_BOOL, REALS, std::log1p(x))
FUNCTION(Expm1, EXPONENTS, REALS, std::expm1(x))
FUNCTION(Sqrt, NUMBERS_AND_BOOL, REALS, std::sqrt(x))
FUNCTION(Rsqrt, NUMBERS_AND_BOOL, REALS, 1 / std::sqrt(x))
FUNCTION(Reciprocal, NUMBERS_AND_BOOL, REALS, 1 / x)
FUNCTION(Sin, NUMBERS_AND_BOOL, REALS, std::sin(x))
FUNCTION(Cos, NUMBERS_AND_BOOL, REALS, std::cos(x))
FUNCTION(Tanh, TANHS, FLOATS, std::tanh(x))
FUNCTION(Sigmoid, NUMBERS_AND_BOOL, REALS, 1 / (1 + std::exp(-x)))
FUNCTION(Erf, EXPONENTS, REALS, std::erf(x))

#define SAME(NAME, IN, FORMULA)                                \
  KERNEL(aclnn##NAME, const aclTensor *self, aclTensor *out) { \
    PLAN { return same(self, out, IN, [](auto x) { return FORMULA; }); }; \
  }

SAME(Neg, NEGATED, -x)
SAME(Sign, SIGNED, x > 0 ? decltype(x)(1) : x < 0 ? decltype(x)(-1) : x)  // NaN stays NaN
SAME(Floor, STEPPED, std::floor(x))
SAME(Ceil, FLOATS, std::ceil(x))
SAME(Trunc, FLOATS, std::trunc(x))
SAME(Relu, RECTIFIED, x < 0 ? decltype(x)(0) : x)

KERNEL(aclnnAbs, const aclTensor *self, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require_castable(self->dtype, out, "out");
    return combine(out, self->dtype, [](auto x) { return x < 0 ? -x : x == 0 ? decltype(x)(0) : x; }, self);
  };
}

KERNEL(aclnnCast, const aclTensor *self, int dtype, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", ANYTHING);
    require_dtype(out, "out", ANYTHING);
    require(dtype == out->dtype, "out is %s, and dtype says %s", dtype_name(out->dtype), dtype_name(dtype));
    require_shape(out, "out", self->shape);
    return [=] {
      if (self->dtype == dtype) return copy_items(self, out);
      in_wide_type({self->dtype}, [&](auto zero) { write(out, read<decltype(zero)>(self)); });
    };
  };
}

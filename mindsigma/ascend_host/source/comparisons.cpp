// Comparisons, logic and choice.
#include "mapping.h"

namespace {

template <class F>
Run compare(const aclTensor *x, const aclTensor *y, const aclTensor *out, F f) {
  require_dtype(x, "self", NUMBERS_AND_BOOL);
  require_dtype(y, "other", NUMBERS_AND_BOOL);
  require_dtype(out, "out", NUMBERS_AND_BOOL);
  return judge(out, promote(x->dtype, y->dtype), f, x, y);
}

template <class F>
Run compare(const aclTensor *x, const aclScalar *y, const aclTensor *out, F f) {
  require_dtype(x, "self", NUMBERS_AND_BOOL);
  require_dtype(out, "out", NUMBERS_AND_BOOL);
  aclScalar other = kept(y, "other");
  return judge(out, promote(x, &other, out), f, x, other);
}

template <class F>
Run decide(const aclTensor *x, const aclTensor *y, const aclTensor *out, F f) {
  for (const aclTensor *tensor : {x, y, out}) require_dtype(tensor, "a tensor", NUMBERS_AND_BOOL);
  return judge(out, promote(x->dtype, y->dtype), f, x, y);
}

constexpr Dtypes CONDITIONS{BOOL, U8};

}  // namespace

#define OF_TENSORS(NAME, SIGN)                                                                      \
  KERNEL(aclnn##NAME##Tensor, const aclTensor *self, const aclTensor *other, aclTensor *out) {      \
    PLAN { return compare(self, other, out, [](auto x, auto y) { return x SIGN y; }); };            \
  }
#define OF_SCALAR(NAME, SIGN)                                                                       \
  KERNEL(aclnn##NAME##Scalar, const aclTensor *self, const aclScalar *other, aclTensor *out) {      \
    PLAN { return compare(self, other, out, [](auto x, auto y) { return x SIGN y; }); };            \
  }
OF_TENSORS(Eq, ==)
OF_TENSORS(Ne, !=)
OF_TENSORS(Lt, <)
OF_TENSORS(Le, <=)
OF_TENSORS(Gt, >)
OF_TENSORS(Ge, >=)
OF_SCALAR(Eq, ==)
OF_SCALAR(Ne, !=)
OF_SCALAR(Ge, >=)

#define LOGIC(NAME, FORMULA)                                                                     \
  KERNEL(aclnn##NAME, const aclTensor *self, const aclTensor *other, aclTensor *out) {           \
    PLAN { return decide(self, other, out, [](auto x, auto y) { return FORMULA; }); };           \
  }
LOGIC(LogicalAnd, x != 0 && y != 0)
LOGIC(LogicalOr, x != 0 || y != 0)
LOGIC(LogicalXor, (x != 0) != (y != 0))

KERNEL(aclnnLogicalNot, const aclTensor *self, aclTensor *out) {
  PLAN { return decide(self, self, out, [](auto x, auto) { return x == 0; }); };
}

KERNEL(aclnnIsFinite, const aclTensor *self, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require_dtype(out, "out", {BOOL});
    return judge(out, self->dtype, [](auto x) { return std::isfinite(static_cast<double>(x)); }, self);
  };
}

// Items are chosen, not computed: every bit of them stays where no conversion is asked for.
KERNEL(aclnnSWhere, const aclTensor *condition, const aclTensor *self, const aclTensor *other, aclTensor *out) {
  PLAN {
    require_dtype(condition, "condition", CONDITIONS);
    require_dtype(self, "self", ANYTHING);
    require_dtype(other, "other", ANYTHING);
    int common = promote(self->dtype, other->dtype);
    require_castable(common, out, "out");
    return combine(out, common, [](auto chosen, auto x, auto y) { return chosen != 0 ? x : y; }, condition, self, other);
  };
}

// MindSpore's own addition to CANN: raises a flag, lowered before, when a number is not finite.
KERNEL(aclnnAllFinite, const aclTensor *gradient, const aclTensor *flag) {
  PLAN {
    require_dtype(gradient, "gradient", FLOATS);
    require(elements(flag) == 1, "the flag has %ld elements", elements(flag));
    return [=] {
      std::vector<float> values = read<float>(gradient);
      bool finite = std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
      if (!finite) write(const_cast<aclTensor *>(flag), std::vector<int64_t>{1});
    };
  };
}

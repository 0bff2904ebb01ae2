// Operators of one number for another: dtypes as CANN's pages list them, computed wide, rounded once.
#include "arrays.h"

namespace {

// out = f(x), element by element.
template <class F>
Run map(const aclTensor *x, aclTensor *out, F f) {
  require_shape(out, "out", x->shape);
  return [=] {
    std::vector<float> values = read<float>(x);
    for (float &value : values) value = f(value);
    write(out, values);
  };
}

}  // namespace

KERNEL(aclnnSilu, const aclTensor *x, aclTensor *out) {
  PLAN {
    require_dtype(x, "self", {F32, F16, BF16});
    require_same_dtype(x, out, "self and out");
    require_rank(x, "self", 0, 8);
    return map(x, out, [](float v) { return v / (1.0f + std::exp(-v)); });
  };
}

// Activations and their gradients: the formulas of CANN's pages, computed in fp32, rounded once.
#include "mapping.h"

namespace {

constexpr double PI = 3.14159265358979323846;

template <class F>
Run activation(const aclTensor *x, aclTensor *out, F f) {
  require_dtype(x, "self", FLOATS);
  require_same_dtype(x, out, "self and out");
  return combine(out, x->dtype, f, x);
}

// f(gradient of the output, what the forward pass kept).
template <class F>
Run gradient(const aclTensor *grad, const aclTensor *x, const aclTensor *out, Dtypes allowed, F f) {
  require_dtype(grad, "gradOutput", allowed);
  require_dtype(x, "self", allowed);
  require_dtype(out, "gradInput", allowed);
  return combine(out, promote(grad->dtype, x->dtype), f, grad, x);
}

template <class T>
T sigmoid(T x) { return 1 / (1 + std::exp(-x)); }

// GELU in the tanh approximation, x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), and its slope.
template <class T>
T gelu_tanh(T x) {
  return x * sigmoid(T(2 * std::sqrt(2 / PI)) * (x + T(0.044715) * x * x * x));
}
template <class T>
T gelu_tanh_slope(T x) {
  T scale = T(2 * std::sqrt(2 / PI)), s = sigmoid(scale * (x + T(0.044715) * x * x * x));
  return s + x * s * (1 - s) * scale * (1 + T(3 * 0.044715) * x * x);
}
template <class T>
T gelu_erf(T x) { return T(0.5) * x * (1 + std::erf(x * T(std::sqrt(0.5)))); }
template <class T>
T gelu_erf_slope(T x) {
  return T(0.5) * (1 + std::erf(x * T(std::sqrt(0.5)))) + x * std::exp(T(-0.5) * x * x) * T(1 / std::sqrt(2 * PI));
}

}  // namespace

KERNEL(aclnnSilu, const aclTensor *self, aclTensor *out) {
  PLAN { return activation(self, out, [](auto x) { return x * sigmoid(x); }); };
}

KERNEL(aclnnSiluBackward, const aclTensor *grad, const aclTensor *self, aclTensor *out) {
  PLAN {
    return gradient(grad, self, out, FLOATS, [](auto g, auto x) {
      auto s = sigmoid(x);
      return g * s * (1 + x * (1 - s));
    });
  };
}

KERNEL(aclnnSigmoidBackward, const aclTensor *grad, const aclTensor *output, aclTensor *out) {
  PLAN { return gradient(grad, output, out, REALS, [](auto g, auto y) { return g * y * (1 - y); }); };
}

KERNEL(aclnnTanhBackward, const aclTensor *grad, const aclTensor *output, aclTensor *out) {
  PLAN { return gradient(grad, output, out, REALS, [](auto g, auto y) { return g * (1 - y * y); }); };
}

// The tanh approximation; so is its gradient, whose page gives the exact formula beside it.
KERNEL(aclnnGelu, const aclTensor *self, aclTensor *out) {
  PLAN { return activation(self, out, [](auto x) { return gelu_tanh(x); }); };
}

KERNEL(aclnnGeluBackward, const aclTensor *grad, const aclTensor *self, const aclTensor *out) {
  PLAN { return gradient(grad, self, out, FLOATS, [](auto g, auto x) { return g * gelu_tanh_slope(x); }); };
}

KERNEL(aclnnGeluV2, const aclTensor *self, int64_t approximate, aclTensor *out) {
  PLAN {
    require(approximate == 0 || approximate == 1, "approximate is %ld; CANN takes 0 (none) and 1 (tanh)", approximate);
    if (approximate) return activation(self, out, [](auto x) { return gelu_tanh(x); });
    return activation(self, out, [](auto x) { return gelu_erf(x); });
  };
}

KERNEL(aclnnGeluBackwardV2, const aclTensor *grad, const aclTensor *self, char *approximate, aclTensor *out) {
  PLAN {
    std::string way = approximate ? approximate : "none";
    require(way == "none" || way == "tanh", "approximate is \"%s\"; CANN takes none and tanh", way.c_str());
    if (way == "tanh") return gradient(grad, self, out, FLOATS, [](auto g, auto x) { return g * gelu_tanh_slope(x); });
    return gradient(grad, self, out, FLOATS, [](auto g, auto x) { return g * gelu_erf_slope(x); });
  };
}

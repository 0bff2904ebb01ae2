// Softmax and its logarithm along one dimension, with gradients: sums in double, outputs rounded once.
#include "arrays.h"

namespace {

constexpr std::initializer_list<int> FORWARD = {F32, F16, BF16, F64};
constexpr std::initializer_list<int> BACKWARD = {F32, F16, BF16};

// A packed tensor as lines along one dimension: (outer, length, inner).
struct Lines {
  int64_t outer, length, inner;
};

Lines lines_of(const Shape &shape, int64_t dim) {
  size_t axis = axis_of(dim, shape.size(), "dim");
  Lines lines{1, shape.empty() ? 1 : shape[axis], 1};
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i < axis) lines.outer *= shape[i];
    if (i > axis) lines.inner *= shape[i];
  }
  return lines;
}

template <class F>
void for_lines(const Lines &lines, F each) {
  if (!lines.length) return;
  in_parallel(lines.outer * lines.inner, 16 * lines.length, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) each(i / lines.inner * lines.length * lines.inner + i % lines.inner);
  });
}

Run softmax(const aclTensor *x, int64_t dim, aclTensor *out, bool logarithm) {
  require_dtype(x, "self", FORWARD);
  require_dtype(out, "out", FORWARD);
  require_rank(x, "self", 0, 8);
  require_shape(out, "out", x->shape);
  Lines lines = lines_of(x->shape, dim);
  return [=] {
    in_wide_type({x->dtype, F32}, [&](auto number) {
      using T = decltype(number);
      if constexpr (std::is_floating_point_v<T>) {
        std::vector<T> values = read<T>(x);
        for_lines(lines, [&](int64_t start) {
          T *line = &values[start], top = line[0];
          for (int64_t j = 1; j < lines.length; ++j) top = std::max(top, line[j * lines.inner]);
          double sum = 0;
          for (int64_t j = 0; j < lines.length; ++j) {
            T &value = line[j * lines.inner];
            value -= top;
            T power = std::exp(value);
            sum += power;
            if (!logarithm) value = power;
          }
          double change = logarithm ? std::log(sum) : 1 / sum;
          for (int64_t j = 0; j < lines.length; ++j) {
            T &value = line[j * lines.inner];
            value = static_cast<T>(logarithm ? value - change : value * change);
          }
        });
        write(out, values);
      }
    });
  };
}

Run softmax_backward(const aclTensor *dy, const aclTensor *y, int64_t dim, aclTensor *dx, bool logarithm) {
  require_dtype(dy, "gradOutput", BACKWARD);
  require_same_dtype(dy, y, "gradOutput and output");
  require_shape(y, "output", dy->shape);
  require_shape(dx, "out", dy->shape);
  require_rank(dy, "gradOutput", 0, 8);
  Lines lines = lines_of(dy->shape, dim);
  return [=] {
    std::vector<float> grad = read<float>(dy), values = read<float>(y);
    for_lines(lines, [&](int64_t start) {
      double sum = 0;
      for (int64_t j = 0; j < lines.length; ++j) {
        int64_t at = start + j * lines.inner;
        sum += logarithm ? grad[at] : double(grad[at]) * values[at];
      }
      for (int64_t j = 0; j < lines.length; ++j) {
        int64_t at = start + j * lines.inner;
        grad[at] = static_cast<float>(logarithm ? grad[at] - std::exp(values[at]) * sum : (grad[at] - sum) * values[at]);
      }
    });
    write(dx, grad);
  };
}

}  // namespace

KERNEL(aclnnSoftmax, const aclTensor *x, int64_t dim, aclTensor *out) {
  PLAN { return softmax(x, dim, out, false); };
}
KERNEL(aclnnLogSoftmax, const aclTensor *x, int64_t dim, aclTensor *out) {
  PLAN { return softmax(x, dim, out, true); };
}
KERNEL(aclnnSoftmaxBackward, const aclTensor *dy, const aclTensor *y, int64_t dim, aclTensor *dx) {
  PLAN { return softmax_backward(dy, y, dim, dx, false); };
}
KERNEL(aclnnLogSoftmaxBackward, const aclTensor *dy, const aclTensor *y, int64_t dim, aclTensor *dx) {
  PLAN { return softmax_backward(dy, y, dim, dx, true); };
}

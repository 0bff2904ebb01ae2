// Kernels that make numbers of nothing: constants, ranges, triangles.
#include "mapping.h"

namespace {

Run fill(const aclTensor *out, const aclScalar &scalar) {
  require_dtype(out, "selfRef", ANYTHING);
  return [=] {
    in_wide_type({out->dtype}, [&](auto zero) {
      std::vector<decltype(zero)> values(elements(out), value<decltype(zero)>(&scalar));
      write(const_cast<aclTensor *>(out), values);
    });
  };
}

Run fill(const aclTensor *out, float number) {
  aclScalar scalar{F32, {}};
  std::memcpy(scalar.bytes, &number, sizeof number);
  return fill(out, scalar);
}

constexpr Dtypes RANGED{F32, F16, BF16, F64, I64, I32};

// Keep one side of a diagonal of the last two dimensions.
template <class F>
Run triangle(const aclTensor *self, const aclTensor *out, F keeps) {
  require_dtype(self, "self", ANYTHING);
  require_rank(self, "self", 2, MOST_DIMENSIONS);
  require_shape(out, "out", self->shape);
  require_castable(self->dtype, out, "out");
  return [=] {
    int64_t columns = self->shape.back(), rows = self->shape[self->shape.size() - 2];
    in_wide_type({self->dtype}, [&](auto zero) {
      auto values = read<decltype(zero)>(self);
      for (size_t i = 0; i < values.size(); ++i)
        if (!keeps(int64_t(i) % columns - int64_t(i) / columns % rows)) values[i] = 0;
      write(const_cast<aclTensor *>(out), values);
    });
  };
}

}  // namespace

KERNEL(aclnnInplaceZero, aclTensor *self) { PLAN { return fill(self, 0); }; }
KERNEL(aclnnInplaceOne, const aclTensor *self) { PLAN { return fill(self, 1); }; }
KERNEL(aclnnInplaceFillScalar, aclTensor *self, const aclScalar *value) {
  PLAN { return fill(self, kept(value, "value")); };
}

KERNEL(aclnnInplaceFillTensor, aclTensor *self, const aclTensor *value) {
  PLAN {
    require_dtype(self, "selfRef", NUMBERS_AND_BOOL);
    require_dtype(value, "value", NUMBERS_AND_BOOL);
    require(value->shape.empty() || value->shape == Shape{1}, "value has the shape %s; CANN takes one number",
            text(value->shape).c_str());
    return [=] {
      in_wide_type({value->dtype}, [&](auto zero) {
        auto number = read<decltype(zero)>(value)[0];
        write(self, std::vector<decltype(zero)>(elements(self), number));
      });
    };
  };
}

KERNEL(aclnnArange, const aclScalar *start, const aclScalar *end, const aclScalar *step, aclTensor *out) {
  PLAN {
    require_dtype(out, "out", RANGED);
    aclScalar first = kept(start, "start"), last = kept(end, "end"), stride = kept(step, "step");
    double from = value<double>(&first), to = value<double>(&last), by = value<double>(&stride);
    require(by != 0 && (to - from) / by >= 0, "from %g to %g by %g", from, to, by);
    require_shape(out, "out", {static_cast<int64_t>(std::ceil((to - from) / by))});
    return [=] {
      in_wide_type({out->dtype}, [&](auto zero) {
        using T = decltype(zero);
        std::vector<T> values(elements(out));
        T begin = value<T>(&first), delta = value<T>(&stride);
        for (size_t i = 0; i < values.size(); ++i) values[i] = begin + static_cast<T>(i) * delta;
        write(out, values);
      });
    };
  };
}

KERNEL(aclnnLinspace, const aclScalar *start, const aclScalar *end, int64_t steps, aclTensor *out) {
  PLAN {
    require_dtype(out, "out", NUMBERS);
    aclScalar first = kept(start, "start"), last = kept(end, "end");
    require(steps >= 0, "steps is %ld", steps);
    require_shape(out, "out", {steps});
    double from = value<double>(&first), to = value<double>(&last);
    return [=] {
      std::vector<double> values(steps);
      for (int64_t i = 0; i < steps; ++i) values[i] = steps == 1 ? from : from + (to - from) * i / (steps - 1);
      write(out, values);
    };
  };
}

KERNEL(aclnnEye, int64_t rows, int64_t columns, aclTensor *out) {
  PLAN {
    require_dtype(out, "out", NUMBERS_AND_BOOL);
    require_shape(out, "out", {rows, columns});
    return [=] {
      std::vector<int64_t> values(rows * columns);
      for (int64_t i = 0; i < std::min(rows, columns); ++i) values[i * columns + i] = 1;
      write(out, values);
    };
  };
}

KERNEL(aclnnTril, const aclTensor *self, int64_t diagonal, aclTensor *out) {
  PLAN { return triangle(self, out, [=](int64_t off) { return off <= diagonal; }); };
}
KERNEL(aclnnTriu, const aclTensor *self, int64_t diagonal, aclTensor *out) {
  PLAN { return triangle(self, out, [=](int64_t off) { return off >= diagonal; }); };
}

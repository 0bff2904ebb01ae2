// Kernels that write at places which other tensors name.
#include "places.h"

namespace {

constexpr Dtypes MASKED{F32, F16, BF16, I32, I64, I8, BOOL};

enum Reduction : int64_t { REPLACE = 0, ADD = 1, MULTIPLY = 2, LARGEST = 3, SMALLEST = 4 };

// out = self, with values put at places along a dimension: a tensor of the index's shape or larger, or a scalar.
Run scatter(const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source, const aclScalar *value,
            int64_t reduction, const aclTensor *out) {
  require_dtype(self, "self", NUMBERS_AND_BOOL);
  require_dtype(index, "index", INDICES);
  require_same_dtype(self, out, "self and out");
  require_shape(out, "out", self->shape);
  require(reduction >= REPLACE && reduction <= SMALLEST, "reduce is %ld; this host takes 0 to 4", reduction);
  int64_t axis = axis_of(dim, self->shape.size(), "dim");
  require(index->shape.size() == self->shape.size(), "index has the shape %s, self %s", text(index->shape).c_str(),
          text(self->shape).c_str());
  for (size_t i = 0; i < index->shape.size(); ++i) {
    require(int64_t(i) == axis || index->shape[i] <= self->shape[i], "index %s is larger than self %s",
            text(index->shape).c_str(), text(self->shape).c_str());
    if (source) {
      require_same_dtype(self, source, "self and src");
      require(source->shape.size() == index->shape.size() && index->shape[i] <= source->shape[i], "index %s, src %s",
              text(index->shape).c_str(), text(source->shape).c_str());
    }
  }
  aclScalar number = value ? *value : aclScalar{F32, {}};
  return [=] {
    in_wide_type({self->dtype}, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> result = read<T>(self);
      std::vector<int64_t> rows = read<int64_t>(index);
      aclTensor given = source ? view(source, index->shape, source->strides, source->offset) : aclTensor();
      std::vector<T> values = source ? read<T>(&given) : std::vector<T>(rows.size(), ::value<T>(&number));
      Shape strides = packed_strides(self->shape), own = packed_strides(index->shape);
      for (size_t i = 0; i < rows.size(); ++i) {
        int64_t place = checked(rows[i], self->shape.empty() ? 1 : self->shape[axis]);
        int64_t at = self->shape.empty() ? 0 : place * strides[axis];
        for (size_t j = 0; j < own.size(); ++j)
          if (int64_t(j) != axis) at += int64_t(i) / own[j] % index->shape[j] * strides[j];
        T &target = result[at];
        target = reduction == ADD        ? target + values[i]
                 : reduction == MULTIPLY ? target * values[i]
                 : reduction == LARGEST  ? std::max(target, values[i])
                 : reduction == SMALLEST ? std::min(target, values[i])
                                         : values[i];
      }
      write(const_cast<aclTensor *>(out), result);
    });
  };
}

Run masked_fill(aclTensor *self, const aclTensor *mask, const aclTensor *number, const aclScalar *scalar) {
  require_dtype(self, "selfRef", MASKED);
  require_dtype(mask, "mask", {BOOL});
  require_shape(self, "selfRef", broadcast(self->shape, mask->shape));
  require(!number || elements(number) == 1, "value is not one number");
  aclScalar kept_scalar = scalar ? *scalar : aclScalar{F32, {}};
  return [=] {
    in_wide_type({self->dtype}, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> values = read<T>(self);
      std::vector<int64_t> chosen = read<int64_t>(mask, self->shape);
      T filling = number ? read<T>(number)[0] : value<T>(&kept_scalar);
      for (size_t i = 0; i < values.size(); ++i)
        if (chosen[i]) values[i] = filling;
      write(self, values);
    });
  };
}

}  // namespace

KERNEL(aclnnIndexPutImpl, aclTensor *self, const aclTensorList *indices, const aclTensor *values, bool accumulate, bool) {
  PLAN {
    require_dtype(self, "selfRef", INDEXED);
    require_same_dtype(self, values, "selfRef and values");
    for (aclTensor *index : indices->values) require_dtype(index, "an index", NAMES);
    return [=, named = indices->values] {
      Named to(self, named);
      in_wide_type({self->dtype}, [&](auto zero) {
        using T = decltype(zero);
        std::vector<T> given = read<T>(values, to.shape);
        for (size_t i = 0; i < given.size(); ++i) {
          aclTensor one = view(self, {}, {}, to.places[i]);
          write(&one, std::vector<T>{accumulate ? static_cast<T>(read<T>(&one)[0] + given[i]) : given[i]});
        }
      });
    };
  };
}

KERNEL(aclnnIndexAdd, const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source,
       const aclScalar *alpha, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require_dtype(index, "index", INDICES);
    require_same_dtype(self, source, "self and source");
    require_same_dtype(self, out, "self and out");
    require_rank(index, "index", 0, 1);
    int64_t axis = axis_of(dim, self->shape.size(), "dim");
    Shape shape = self->shape;
    if (!shape.empty()) shape[axis] = elements(index);
    require_shape(source, "source", shape);
    require_shape(out, "out", self->shape);
    aclScalar factor = kept(alpha, "alpha");
    return [=] {
      Around all(self->shape, axis);
      in_wide_type({self->dtype}, [&](auto zero) {
        using T = decltype(zero);
        std::vector<T> result = read<T>(self), given = read<T>(source);
        std::vector<int64_t> rows = read<int64_t>(index);
        T scale = value<T>(&factor);
        for (int64_t i = 0, from = 0; i < all.outer; ++i)
          for (int64_t row : rows)
            for (int64_t j = 0; j < all.inner; ++j, ++from)
              result[(i * all.side + checked(row, all.side)) * all.inner + j] += scale * given[from];
        write(out, result);
      });
    };
  };
}

KERNEL(aclnnScatter, const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source, int64_t reduce,
       aclTensor *out) {
  PLAN { return scatter(self, dim, index, source, nullptr, reduce, out); };
}
KERNEL(aclnnScatterAdd, const aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source,
       aclTensor *out) {
  PLAN { return scatter(self, dim, index, source, nullptr, ADD, out); };
}
KERNEL(aclnnScatterValue, const aclTensor *self, int64_t dim, const aclTensor *index, const aclScalar *value,
       int64_t reduce, aclTensor *out) {
  PLAN { return scatter(self, dim, index, nullptr, value, reduce, out); };
}
KERNEL(aclnnInplaceScatter, aclTensor *self, int64_t dim, const aclTensor *index, const aclTensor *source,
       int64_t reduce) {
  PLAN { return scatter(self, dim, index, source, nullptr, reduce, self); };
}
KERNEL(aclnnInplaceScatterValue, aclTensor *self, int64_t dim, const aclTensor *index, const aclScalar *value,
       int64_t reduce) {
  PLAN { return scatter(self, dim, index, nullptr, value, reduce, self); };
}

KERNEL(aclnnInplaceMaskedFillScalar, aclTensor *self, const aclTensor *mask, const aclScalar *value) {
  PLAN { return masked_fill(self, mask, nullptr, value); };
}
KERNEL(aclnnInplaceMaskedFillTensor, aclTensor *self, const aclTensor *mask, const aclTensor *value) {
  PLAN { return masked_fill(self, mask, value, nullptr); };
}

KERNEL(aclnnEmbeddingDenseBackward, const aclTensor *grad, const aclTensor *indices, uint64_t rows, uint64_t padding,
       bool scaled, const aclTensor *out) {
  PLAN {
    require_dtype(grad, "grad", FLOATS);
    require_dtype(indices, "indices", NUMBERS_AND_BOOL);
    Shape shape = indices->shape;
    int64_t width = grad->shape.empty() ? 1 : grad->shape.back();
    shape.push_back(width);
    require_shape(grad, "grad", shape);
    require_shape(out, "out", {static_cast<int64_t>(rows), width});
    return [=] {
      std::vector<float> given = read<float>(grad), sum(rows * width);
      std::vector<int64_t> places = read<int64_t>(indices), count(rows);
      for (int64_t place : places) ++count[checked(place, rows)];
      for (size_t i = 0; i < places.size(); ++i) {
        if (places[i] == static_cast<int64_t>(padding)) continue;
        float scale = scaled ? 1.0f / count[places[i]] : 1.0f;
        for (int64_t j = 0; j < width; ++j) sum[places[i] * width + j] += scale * given[i * width + j];
      }
      write(const_cast<aclTensor *>(out), sum);
    };
  };
}

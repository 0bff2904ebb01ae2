// Kernels that read at places which other tensors name, and that sort.
#include <numeric>

#include "places.h"

namespace {

// Items at places in elements, in the order of the output.
void pick(const aclTensor *self, const std::vector<int64_t> &places, aclTensor *out) {
  size_t size = item_size(self->dtype);
  std::vector<char> taken(places.size() * size);
  for (size_t i = 0; i < places.size(); ++i) std::memcpy(&taken[i * size], self->data + places[i] * size, size);
  aclTensor packed{self->dtype, 0, out->shape, packed_strides(out->shape), 0, out->shape, taken.data()};
  copy_items(&packed, out);
}

// Rows of `self` along an axis.
Run select_rows(const aclTensor *self, int64_t dim, const aclTensor *index, const Shape &shape, const aclTensor *out) {
  require_dtype(self, "self", ANYTHING);
  require_dtype(index, "index", INDICES);
  require_same_dtype(self, out, "self and out");
  require_shape(out, "out", shape);
  return [=] {
    Around all(self->shape, dim);
    in_wide_type({self->dtype}, [&](auto zero) {
      auto values = read<decltype(zero)>(self);
      std::vector<int64_t> rows = read<int64_t>(index);
      std::vector<decltype(zero)> result;
      result.reserve(elements(out));
      for (int64_t i = 0; i < all.outer; ++i)
        for (int64_t row : rows) {
          auto from = values.begin() + (i * all.side + checked(row, all.side)) * all.inner;
          result.insert(result.end(), from, from + all.inner);
        }
      write(const_cast<aclTensor *>(out), result);
    });
  };
}

// Sorted along a dimension, the first `count`; NaN is the largest.
Run sorted(const aclTensor *self, int64_t dim, int64_t count, bool descending, const aclTensor *values,
           const aclTensor *indices) {
  require_dtype(self, "self", NUMBERS_AND_BOOL);
  require_same_dtype(self, values, "self and values");
  require_dtype(indices, "indices", {I64});
  int64_t axis = axis_of(dim, self->shape.size(), "dim");
  Shape shape = self->shape;
  require(shape.empty() || (count >= 0 && count <= shape[axis]), "%ld of %ld", count, shape.empty() ? 1 : shape[axis]);
  if (!shape.empty()) shape[axis] = count;
  require_shape(values, "values", shape);
  require_shape(indices, "indices", shape);
  return [=] {
    Around all(self->shape, axis);
    in_wide_type({self->dtype}, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> given = read<T>(self), taken(elements(shape));
      std::vector<int64_t> order(all.side), places(taken.size());
      for (int64_t i = 0; i < all.outer * all.inner; ++i) {
        const T *from = given.data() + i / all.inner * all.side * all.inner + i % all.inner;
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
          T x = from[a * all.inner], y = from[b * all.inner];
          if (descending) std::swap(x, y);
          return x < y || (x == x && y != y);
        });
        for (int64_t j = 0; j < count; ++j) {
          int64_t to = (i / all.inner * count + j) * all.inner + i % all.inner;
          taken[to] = from[order[j] * all.inner];
          places[to] = order[j];
        }
      }
      write(const_cast<aclTensor *>(values), taken);
      write(const_cast<aclTensor *>(indices), places);
    });
  };
}

}  // namespace

KERNEL(aclnnIndexSelect, const aclTensor *self, int64_t dim, const aclTensor *index, aclTensor *out) {
  PLAN {
    require_rank(index, "index", 0, 1);
    int64_t axis = axis_of(dim, self->shape.size(), "dim");
    Shape shape = self->shape;
    if (!shape.empty()) shape[axis] = elements(index);
    return select_rows(self, axis, index, shape, out);
  };
}

KERNEL(aclnnEmbedding, const aclTensor *weight, const aclTensor *indices, const aclTensor *out) {
  PLAN {
    require_rank(weight, "weight", 2, 2);
    Shape shape = indices->shape;
    shape.push_back(weight->shape[1]);
    return select_rows(weight, 0, indices, shape, out);
  };
}

KERNEL(aclnnGather, const aclTensor *self, int64_t dim, const aclTensor *index, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", ANYTHING);
    require_dtype(index, "index", INDICES);
    require_same_dtype(self, out, "self and out");
    require_shape(out, "out", index->shape);
    require(index->shape.size() == self->shape.size(), "index has the shape %s, self %s", text(index->shape).c_str(),
            text(self->shape).c_str());
    int64_t axis = axis_of(dim, self->shape.size(), "dim");
    for (size_t i = 0; i < index->shape.size(); ++i)
      require(int64_t(i) == axis || index->shape[i] <= self->shape[i], "index %s is larger than self %s",
              text(index->shape).c_str(), text(self->shape).c_str());
    return [=] {
      aclTensor others = *self;  // the places that the other dimensions say
      if (!others.shape.empty()) others.strides[axis] = 0;
      std::vector<int64_t> places = offsets(&others, others.shape = index->shape), rows = read<int64_t>(index);
      if (!others.shape.empty())
        for (size_t i = 0; i < rows.size(); ++i) places[i] += checked(rows[i], self->shape[axis]) * self->strides[axis];
      pick(self, places, out);
    };
  };
}

KERNEL(aclnnIndex, const aclTensor *self, const aclTensorList *indices, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", INDEXED);
    require_same_dtype(self, out, "self and out");
    for (aclTensor *index : indices->values) require_dtype(index, "an index", NAMES);
    return [=, named = indices->values] {
      Named from(self, named);
      require_shape(out, "out", from.shape);
      pick(self, from.places, out);
    };
  };
}

KERNEL(aclnnOneHot, const aclTensor *self, int classes, const aclTensor *on, const aclTensor *off, int64_t axis,
       aclTensor *out) {
  PLAN {
    require_dtype(self, "self", INDICES);
    require_same_dtype(on, out, "onValue and out");
    require_same_dtype(off, out, "offValue and out");
    int64_t at = axis == -1 ? self->shape.size() : axis_of(axis, self->shape.size() + 1, "axis");
    Shape shape = self->shape;
    shape.insert(shape.begin() + at, classes);
    require_shape(out, "out", shape);
    return [=] {
      Around all(shape, at);
      in_wide_type({out->dtype}, [&](auto zero) {
        using T = decltype(zero);
        std::vector<int64_t> hot = read<int64_t>(self);
        T yes = read<T>(on)[0], no = read<T>(off)[0];
        std::vector<T> result(elements(out), no);
        for (size_t i = 0; i < hot.size(); ++i)
          if (hot[i] >= 0 && hot[i] < all.side)  // another number makes a row of `off`
            result[(i / all.inner * all.side + hot[i]) * all.inner + i % all.inner] = yes;
        write(out, result);
      });
    };
  };
}

KERNEL(aclnnTopk, const aclTensor *self, int64_t count, int64_t dim, bool largest, bool, aclTensor *values,
       aclTensor *indices) {
  PLAN { return sorted(self, dim, count, largest, values, indices); };
}
KERNEL(aclnnSort, const aclTensor *self, bool, int64_t dim, bool descending, aclTensor *values, aclTensor *indices) {
  PLAN {
    int64_t side = self->shape.empty() ? 1 : self->shape[axis_of(dim, self->shape.size(), "dim")];
    return sorted(self, dim, side, descending, values, indices);
  };
}

// Kernels that move numbers without changing them: copies, joins, parts, repeats, reorderings.
#include "mapping.h"

namespace {

// Copy with conversion: `from` is broadcast to the shape of `to`.
void assign(const aclTensor *from, aclTensor *to) {
  if (from->dtype == to->dtype) return copy_items(from, to);
  in_wide_type({from->dtype}, [&](auto zero) { write(to, read<decltype(zero)>(from, to->shape)); });
}

// A part of one dimension: `count` elements from `start`, every `step`-th. A step may be negative.
aclTensor part(const aclTensor *tensor, int64_t axis, int64_t start, int64_t count, int64_t step = 1) {
  aclTensor seen = *tensor;
  seen.offset += start * seen.strides[axis];
  seen.shape[axis] = count;
  seen.strides[axis] *= step;
  return seen;
}

// A tensor with a dimension fewer, at a place of it.
aclTensor slice_of(const aclTensor *tensor, int64_t axis, int64_t at) {
  aclTensor seen = part(tensor, axis, at, 1);
  seen.shape.erase(seen.shape.begin() + axis);
  seen.strides.erase(seen.strides.begin() + axis);
  return seen;
}

Shape with_side(Shape shape, int64_t axis, int64_t side) {
  shape[axis] = side;
  return shape;
}

const Shape &numbers(const aclIntArray *array, const char *name) {
  require(array != nullptr, "%s is missing", name);
  return array->values;
}

int64_t clipped(int64_t at, int64_t side) { return std::min(std::max<int64_t>(at < 0 ? at + side : at, 0), side); }

constexpr Dtypes SLICED{F32, F16, BF16, I64, I32, I8, U8, BOOL};
constexpr Dtypes ROLLED{F32, F16, BF16, I8, U8, I16, I32, U32, I64, BOOL};
constexpr Dtypes EXPANDED{F32, F16, BF16, U8, I8, I32, I64, BOOL};

// Parts of one dimension, each to its own tensor.
Run split(const aclTensor *self, const Shape &sizes, int64_t axis, const aclTensorList *out) {
  require(sizes.size() == out->values.size(), "%zu outputs for %zu parts", out->values.size(), sizes.size());
  int64_t total = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    require_same_dtype(self, out->values[i], "self and out");
    require_shape(out->values[i], "a part", with_side(self->shape, axis, sizes[i]));
    total += sizes[i];
  }
  require(total == self->shape[axis], "parts of %ld in all for a side of %ld", total, self->shape[axis]);
  return [=, parts = out->values] {
    int64_t start = 0;
    for (aclTensor *to : parts) {
      aclTensor from = part(self, axis, start, to->shape[axis]);
      copy_items(&from, to);
      start += to->shape[axis];
    }
  };
}

}  // namespace

KERNEL(aclnnInplaceCopy, aclTensor *self, const aclTensor *source) {
  PLAN {
    require_dtype(self, "selfRef", ANYTHING);
    require_dtype(source, "src", ANYTHING);
    require_shape(self, "selfRef", broadcast(self->shape, source->shape));
    return [=] { assign(source, self); };
  };
}

KERNEL(aclnnCat, const aclTensorList *tensors, int64_t dim, aclTensor *out) {
  PLAN {
    std::vector<aclTensor *> given;
    for (aclTensor *tensor : tensors->values)
      if (tensor->shape != Shape{0}) given.push_back(tensor);  // which joins with anything
    if (given.empty()) return [] {};
    int64_t axis = axis_of(dim, given[0]->shape.size(), "dim"), total = 0;
    int common = given[0]->dtype;
    require_rank(given[0], "a tensor", 1, MOST_DIMENSIONS);
    for (aclTensor *tensor : given) {
      require_dtype(tensor, "a tensor", NUMBERS_AND_BOOL);
      require_rank(tensor, "a tensor", given[0]->shape.size(), given[0]->shape.size());
      require_shape(tensor, "a tensor", with_side(given[0]->shape, axis, tensor->shape[axis]));
      common = promote(common, tensor->dtype);
      total += tensor->shape[axis];
    }
    require_castable(common, out, "out");
    require_shape(out, "out", with_side(given[0]->shape, axis, total));
    return [=] {
      int64_t start = 0;
      for (aclTensor *tensor : given) {
        aclTensor to = part(out, axis, start, tensor->shape[axis]);
        assign(tensor, &to);
        start += tensor->shape[axis];
      }
    };
  };
}

KERNEL(aclnnStack, const aclTensorList *tensors, int64_t dim, aclTensor *out) {
  PLAN {
    std::vector<aclTensor *> given = tensors->values;
    require(!given.empty(), "there are no tensors");
    int64_t axis = axis_of(dim, given[0]->shape.size() + 1, "dim");
    Shape shape = given[0]->shape;
    shape.insert(shape.begin() + axis, given.size());
    require_shape(out, "out", shape);
    for (aclTensor *tensor : given) {
      require_dtype(tensor, "a tensor", ANYTHING);
      require_shape(tensor, "a tensor", given[0]->shape);
    }
    return [=] {
      for (size_t i = 0; i < given.size(); ++i) {
        aclTensor to = slice_of(out, axis, i);
        assign(given[i], &to);
      }
    };
  };
}

KERNEL(aclnnSplitTensor, const aclTensor *self, uint64_t sections, int64_t dim, aclTensorList *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    int64_t axis = axis_of(dim, self->shape.size(), "dim"), side = self->shape[axis], size = sections;
    require(size > 0 || !side, "splitSections is 0 for a side of %ld", side);
    Shape sizes;
    for (int64_t start = 0; start < side; start += size) sizes.push_back(std::min(size, side - start));
    return split(self, sizes, axis, out);
  };
}

KERNEL(aclnnSplitWithSize, const aclTensor *self, const aclIntArray *sizes, int64_t dim, aclTensorList *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    return split(self, numbers(sizes, "splitSize"), axis_of(dim, self->shape.size(), "dim"), out);
  };
}

KERNEL(aclnnSlice, const aclTensor *self, int64_t dim, int64_t start, int64_t end, int64_t step, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", SLICED);
    require(step > 0, "step is %ld; CANN takes positive ones", step);
    require_rank(self, "self", 1, MOST_DIMENSIONS);
    int64_t axis = axis_of(dim, self->shape.size(), "dim"), side = self->shape[axis];
    int64_t from = clipped(start, side), to = std::max(clipped(end, side), from), count = (to - from + step - 1) / step;
    require_shape(out, "out", with_side(self->shape, axis, count));
    require_castable(self->dtype, out, "out");
    return [=] {
      aclTensor seen = part(self, axis, from, count, step);
      assign(&seen, out);
    };
  };
}

KERNEL(aclnnPermute, const aclTensor *self, const aclIntArray *dims, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", ANYTHING);
    require_same_dtype(self, out, "self and out");
    const Shape &order = numbers(dims, "dims");
    size_t rank = self->shape.size();
    require(order.size() == rank && rank <= MOST_DIMENSIONS, "%zu dims for a tensor with %zu", order.size(), rank);
    Shape axes, shape;
    for (int64_t dim : order) {
      int64_t axis = axis_of(dim, rank, "dim");
      require(std::find(axes.begin(), axes.end(), axis) == axes.end(), "dim %ld comes twice", dim);
      axes.push_back(axis);
      shape.push_back(self->shape[axis]);
    }
    require_shape(out, "out", shape);
    return [=] {
      Shape strides;
      for (int64_t axis : axes) strides.push_back(self->strides[axis]);
      aclTensor seen = view(self, shape, strides, self->offset);
      copy_items(&seen, out);
    };
  };
}

KERNEL(aclnnExpand, const aclTensor *self, const aclIntArray *size, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", EXPANDED);
    require_same_dtype(self, out, "self and out");
    Shape shape = numbers(size, "size");
    size_t rank = shape.size(), own = self->shape.size();
    require(own <= rank && rank <= MOST_DIMENSIONS, "%zu dimensions expanded to %zu", own, rank);
    for (size_t i = 0; i < rank; ++i)
      if (shape[i] == -1) {
        require(i + own >= rank, "size is -1 for a new dimension");
        shape[i] = self->shape[i + own - rank];
      }
    require_shape(out, "out", shape);
    require(broadcast(self->shape, shape) == shape, "%s does not expand to %s", text(self->shape).c_str(),
            text(shape).c_str());
    return [=] { copy_items(self, out); };
  };
}

KERNEL(aclnnRepeat, const aclTensor *self, const aclIntArray *repeats, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", ANYTHING);
    require_same_dtype(self, out, "self and out");
    Shape times = numbers(repeats, "repeats"), sides = self->shape;
    require(times.size() >= sides.size() && times.size() <= MOST_DIMENSIONS, "%zu repeats for a tensor with %zu dimensions",
            times.size(), sides.size());
    sides.insert(sides.begin(), times.size() - sides.size(), 1);
    Shape shape;
    for (size_t i = 0; i < times.size(); ++i) {
      require(times[i] >= 0, "repeats has %ld", times[i]);
      shape.push_back(times[i] * sides[i]);
    }
    require_shape(out, "out", shape);
    return [=] {  // both seen with the repeats as dimensions of their own
      Shape apart, from, to;
      for (size_t i = 0, skip = times.size() - self->shape.size(); i < times.size(); ++i) {
        apart.insert(apart.end(), {times[i], sides[i]});
        from.insert(from.end(), {0, i < skip ? 0 : self->strides[i - skip]});
        to.insert(to.end(), {out->strides[i] * sides[i], out->strides[i]});
      }
      aclTensor source = view(self, apart, from, self->offset), target = view(out, apart, to, out->offset);
      copy_items(&source, &target);
    };
  };
}

// Pairs of widths before and after, from the last dimension on; negative ones cut.
KERNEL(aclnnConstantPadNd, const aclTensor *self, const aclIntArray *pad, const aclScalar *value, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", ANYTHING);
    require_same_dtype(self, out, "self and out");
    Shape widths = numbers(pad, "pad"), shape = self->shape;
    aclScalar filling = kept(value, "value");
    require(widths.size() % 2 == 0 && widths.size() <= 2 * shape.size(), "pad has %zu numbers for %zu dimensions",
            widths.size(), shape.size());
    for (size_t i = 0; i < widths.size(); ++i) shape[shape.size() - 1 - i / 2] += widths[i];
    for (int64_t side : shape) require(side >= 0, "pad cuts more than there is: %s", text(shape).c_str());
    require_shape(out, "out", shape);
    return [=] {
      in_wide_type({out->dtype}, [&](auto zero) {
        write(out, std::vector<decltype(zero)>(elements(out), ::value<decltype(zero)>(&filling)));
      });
      aclTensor from = *self, to = *out;
      for (size_t i = 0; i < widths.size(); i += 2) {
        int64_t axis = shape.size() - 1 - i / 2, before = widths[i], after = widths[i + 1];
        int64_t cut = std::max<int64_t>(-before, 0), count = from.shape[axis] - cut - std::max<int64_t>(-after, 0);
        from = part(&from, axis, cut, count);
        to = part(&to, axis, std::max<int64_t>(before, 0), count);
      }
      copy_items(&from, &to);
    };
  };
}

KERNEL(aclnnFlip, const aclTensor *self, const aclIntArray *dims, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require_same_dtype(self, out, "self and out");
    require_shape(out, "out", self->shape);
    Shape axes;
    for (int64_t dim : numbers(dims, "dims")) axes.push_back(axis_of(dim, self->shape.size(), "dim"));
    return [=] {
      aclTensor seen = *self;
      for (int64_t axis : axes) seen = part(&seen, axis, seen.shape[axis] - 1, seen.shape[axis], -1);
      if (elements(self)) copy_items(&seen, out);
    };
  };
}

KERNEL(aclnnRoll, const aclTensor *self, const aclIntArray *shifts, const aclIntArray *dims, aclTensor *out) {
  PLAN {
    require_dtype(self, "x", ROLLED);
    require_same_dtype(self, out, "x and out");
    require_shape(out, "out", self->shape);
    Shape steps = numbers(shifts, "shifts"), axes;
    for (int64_t dim : numbers(dims, "dims")) axes.push_back(axis_of(dim, self->shape.size(), "dim"));
    require(steps.size() == axes.size() || (axes.empty() && steps.size() == 1), "%zu shifts for %zu dims", steps.size(),
            axes.size());
    return [=] {
      aclTensor from = *self, to = *out;
      Shape rolled = axes;
      std::vector<char> packed;
      if (axes.empty()) {  // all in a row; a copy makes it one, and out is written in its own order
        packed.resize(elements(self) * item_size(self->dtype));
        from = view(self, self->shape, packed_strides(self->shape), 0);
        from.data = packed.data();
        copy_items(self, &from);
        int64_t count = elements(self), shift = count ? ((steps[0] % count) + count) % count : 0;
        std::rotate(packed.begin(), packed.end() - shift * item_size(self->dtype), packed.end());
        return copy_items(&from, &to);
      }
      if (!elements(self)) return;
      // Every rolled dimension falls into two pieces: all combinations of them.
      for (size_t pieces = 0; pieces < size_t(1) << rolled.size(); ++pieces) {
        aclTensor source = from, target = to;
        for (size_t i = 0; i < rolled.size(); ++i) {
          int64_t side = self->shape[rolled[i]], shift = ((steps[i] % side) + side) % side;
          bool wrapped = pieces >> i & 1;
          source = part(&source, rolled[i], wrapped ? side - shift : 0, wrapped ? shift : side - shift);
          target = part(&target, rolled[i], wrapped ? 0 : shift, wrapped ? shift : side - shift);
        }
        copy_items(&source, &target);
      }
    };
  };
}

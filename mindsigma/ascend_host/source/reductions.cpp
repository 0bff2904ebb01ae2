// Reductions over dimensions, and sums along one. Sums are taken in fp32 by halves, as a device's tree of adders does.
#include <limits>

#include "legacy.h"
#include "mapping.h"

namespace {

// Dimensions that are reduced, brought last: a row of numbers for every element of the result.
struct Reduction {
  Shape order;   // of dimensions, those that stay first
  Shape stays;   // their sides
  Shape result;  // with sides of 1 where `keep` was asked for
  int64_t count = 1;

  // All dimensions when none is named.
  Reduction(const aclTensor *self, const Shape &dims, bool keep) {
    size_t rank = self->shape.size();
    require(rank <= MOST_DIMENSIONS, "self has %zu dimensions; CANN takes 8", rank);
    std::vector<bool> reduced(rank, dims.empty());
    for (int64_t dim : dims) {
      int64_t axis = axis_of(dim, rank, "dim");
      if (!rank) continue;
      require(!reduced[axis], "dim %ld comes twice", dim);
      reduced[axis] = true;
    }
    for (size_t i = 0; i < rank; ++i) {
      if (!reduced[i]) {
        order.push_back(i);
        stays.push_back(self->shape[i]);
        result.push_back(self->shape[i]);
      } else {
        count *= self->shape[i];
        if (keep) result.push_back(1);
      }
    }
    for (size_t i = 0; i < rank; ++i)
      if (reduced[i]) order.push_back(i);
  }

  template <class T>
  std::vector<T> rows(const aclTensor *self, int common) const {
    Shape shape, strides;
    for (int64_t axis : order) {
      shape.push_back(self->shape[axis]);
      strides.push_back(self->strides[axis]);
    }
    aclTensor seen = view(self, shape, strides, self->offset);
    return fetch<T>(&seen, shape, common);
  }
};

const Shape &dims_of(const aclIntArray *dim) {
  static const Shape none;
  return dim ? dim->values : none;
}

template <class T>
T total(const T *values, int64_t count) {
  if (count > 64) return total(values, count / 2) + total(values + count / 2, count - count / 2);
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

// out = f(row, number of its elements) for every row.
template <class F>
Run reduce(const aclTensor *self, const Shape &dims, bool keep, int common, const aclTensor *out, F f) {
  Reduction plan(self, dims, keep);
  require_shape(out, "out", plan.result);
  return [=] {
    in_wide_type({common}, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> rows = plan.rows<T>(self, common), result(elements(plan.stays));
      in_parallel(result.size(), plan.count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) result[i] = static_cast<T>(f(rows.data() + i * plan.count, plan.count));
      });
      store(out, result, common);
    });
  };
}

constexpr auto SUM = [](const auto *row, int64_t count) { return total(row, count); };
constexpr auto MEAN = [](const auto *row, int64_t count) { return count ? total(row, count) / count : NAN; };
constexpr auto PRODUCT = [](const auto *row, int64_t count) {
  auto product = row[0] * 0 + 1;
  for (int64_t i = 0; i < count; ++i) product *= row[i];
  return product;
};

// Place of the first extreme; a NaN is more extreme than any number.
template <class T, class F>
int64_t place(const T *row, int64_t count, F beats) {
  int64_t best = 0;
  for (int64_t i = 1; i < count && row[best] == row[best]; ++i)
    if (row[i] != row[i] || beats(row[i], row[best])) best = i;
  return best;
}
constexpr auto GREATER = [](auto a, auto b) { return a > b; };
constexpr auto LESS = [](auto a, auto b) { return a < b; };

template <class F>
Run extreme(const aclTensor *self, const Shape &dims, bool keep, const aclTensor *out, F beats) {
  require_dtype(self, "self", NUMBERS_AND_BOOL);
  require_same_dtype(self, out, "self and out");
  require(elements(self) || !elements(out), "an extreme of no numbers");
  return reduce(self, dims, keep, self->dtype, out,
                [=](const auto *row, int64_t count) { return row[place(row, count, beats)]; });
}

// Places of extremes along one dimension, and the extremes themselves where `out` is asked for.
template <class F>
Run extreme_place(const aclTensor *self, int64_t dim, bool keep, const aclTensor *out, const aclTensor *indices,
                  F beats) {
  require_dtype(self, "self", NUMBERS_AND_BOOL);
  require_dtype(indices, "indices", INDICES);
  Reduction plan(self, {dim}, keep);
  require(plan.count || !elements(plan.stays), "an extreme of no numbers");
  require_shape(indices, "indices", plan.result);
  if (out) require_shape(out, "out", plan.result);
  return [=] {
    in_wide_type({self->dtype}, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> rows = plan.rows<T>(self, self->dtype), best;
      std::vector<int64_t> found;
      for (int64_t i = 0; i < elements(plan.stays); ++i) {
        found.push_back(place(rows.data() + i * plan.count, plan.count, beats));
        best.push_back(rows[i * plan.count + found.back()]);
      }
      if (out) write(const_cast<aclTensor *>(out), best);
      write(const_cast<aclTensor *>(indices), found);
    });
  };
}

template <class F>
Run quantify(const aclTensor *self, const aclIntArray *dim, bool keep, aclTensor *out, F f) {
  require_dtype(self, "self", NUMBERS_AND_BOOL);
  require_dtype(out, "out", {U8, BOOL});
  return reduce(self, dims_of(dim), keep, self->dtype, out, f);
}

// (sum of |x|^p)^(1/p), with the limits that CANN names: 0 counts, infinities are extremes.
Run norm(const aclTensor *self, const aclScalar *order, const Shape &dims, bool keep, const aclTensor *out) {
  require_dtype(self, "self", FLOATS);
  require_dtype(out, "out", FLOATS);
  double p = kept(order, "p").dtype >= 0 ? value<double>(order) : 2;
  return reduce(self, dims, keep, F32, out, [=](const auto *row, int64_t count) {
    std::vector<double> powers(count);
    for (int64_t i = 0; i < count; ++i) {
      double size = std::fabs(static_cast<double>(row[i]));
      powers[i] = std::isinf(p) ? size : p == 0 ? size != 0 : p == 2 ? size * size : p == 1 ? size : std::pow(size, p);
    }
    if (std::isinf(p)) {
      if (powers.empty()) return 0.0;
      return p > 0 ? *std::max_element(powers.begin(), powers.end()) : *std::min_element(powers.begin(), powers.end());
    }
    double sum = total(powers.data(), count);
    return p == 0 || p == 1 ? sum : p == 2 ? std::sqrt(sum) : std::pow(sum, 1 / p);
  });
}

Run variance(const aclTensor *self, const aclIntArray *dim, int64_t correction, bool keep, const aclTensor *out,
             bool root) {
  require_dtype(self, "self", FLOATS);
  require_same_dtype(self, out, "self and out");
  return reduce(self, dims_of(dim), keep, self->dtype, out, [=](const auto *row, int64_t count) {
    double mean = total(row, count) / double(count), sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += (row[i] - mean) * (row[i] - mean);
    double spread = sum / std::max<double>(count - correction, 0);
    return root ? std::sqrt(spread) : spread;
  });
}

}  // namespace

KERNEL(aclnnReduceSum, const aclTensor *self, const aclIntArray *dims, bool keep, int dtype, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require_dtype(out, "out", NUMBERS_AND_BOOL);
    require(dtype == out->dtype, "out is %s, and dtype says %s", dtype_name(out->dtype), dtype_name(dtype));
    return reduce(self, dims_of(dims), keep, dtype, out, SUM);
  };
}

KERNEL(aclnnMean, const aclTensor *self, const aclIntArray *dims, bool keep, int dtype, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require_dtype(out, "out", NUMBERS);
    require(dtype == out->dtype, "out is %s, and dtype says %s", dtype_name(out->dtype), dtype_name(dtype));
    return reduce(self, dims_of(dims), keep, dtype, out, MEAN);
  };
}

KERNEL(aclnnAmax, const aclTensor *self, const aclIntArray *dims, bool keep, aclTensor *out) {
  PLAN { return extreme(self, dims_of(dims), keep, out, GREATER); };
}
KERNEL(aclnnAmin, const aclTensor *self, const aclIntArray *dims, bool keep, aclTensor *out) {
  PLAN { return extreme(self, dims_of(dims), keep, out, LESS); };
}
KERNEL(aclnnMax, const aclTensor *self, aclTensor *out) { PLAN { return extreme(self, {}, false, out, GREATER); }; }
KERNEL(aclnnMin, const aclTensor *self, aclTensor *out) { PLAN { return extreme(self, {}, false, out, LESS); }; }
KERNEL(aclnnMaxDim, const aclTensor *self, int64_t dim, bool keep, aclTensor *out, aclTensor *indices) {
  PLAN { return extreme_place(self, dim, keep, out, indices, GREATER); };
}
KERNEL(aclnnMinDim, const aclTensor *self, int64_t dim, bool keep, aclTensor *out, aclTensor *indices) {
  PLAN { return extreme_place(self, dim, keep, out, indices, LESS); };
}
KERNEL(aclnnArgMax, const aclTensor *self, int64_t dim, bool keep, aclTensor *out) {
  PLAN { return extreme_place(self, dim, keep, nullptr, out, GREATER); };
}
KERNEL(aclnnArgMin, const aclTensor *self, int64_t dim, bool keep, aclTensor *out) {
  PLAN { return extreme_place(self, dim, keep, nullptr, out, LESS); };
}

KERNEL(aclnnAll, const aclTensor *self, const aclIntArray *dim, bool keep, aclTensor *out) {
  PLAN {
    return quantify(self, dim, keep, out, [](const auto *row, int64_t count) {
      return std::all_of(row, row + count, [](auto x) { return x != 0; });
    });
  };
}
KERNEL(aclnnAny, const aclTensor *self, const aclIntArray *dim, bool keep, aclTensor *out) {
  PLAN {
    return quantify(self, dim, keep, out, [](const auto *row, int64_t count) {
      return std::any_of(row, row + count, [](auto x) { return x != 0; });
    });
  };
}

KERNEL(aclnnProd, const aclTensor *self, int dtype, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require(dtype == out->dtype, "out is %s, and dtype says %s", dtype_name(out->dtype), dtype_name(dtype));
    return reduce(self, {}, false, dtype, out, PRODUCT);
  };
}
KERNEL(aclnnProdDim, const aclTensor *self, int64_t dim, bool keep, int dtype, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS_AND_BOOL);
    require(dtype == out->dtype, "out is %s, and dtype says %s", dtype_name(out->dtype), dtype_name(dtype));
    return reduce(self, {dim}, keep, dtype, out, PRODUCT);
  };
}

KERNEL(aclnnNorm, const aclTensor *self, const aclScalar *order, const aclIntArray *dim, bool keep, aclTensor *out) {
  PLAN { return norm(self, order, dims_of(dim), keep, out); };
}
KERNEL(aclnnLinalgVectorNorm, const aclTensor *self, const aclScalar *order, const aclIntArray *dims, bool keep,
       int dtype, aclTensor *out) {
  PLAN {
    require(dtype == out->dtype, "out is %s, and dtype says %s", dtype_name(out->dtype), dtype_name(dtype));
    return norm(self, order, dims_of(dims), keep, out);
  };
}

KERNEL(aclnnVarCorrection, const aclTensor *self, const aclIntArray *dim, int64_t correction, bool keep,
       aclTensor *out) {
  PLAN { return variance(self, dim, correction, keep, out, false); };
}
KERNEL(aclnnStd, const aclTensor *self, const aclIntArray *dim, int64_t correction, bool keep, aclTensor *out) {
  PLAN { return variance(self, dim, correction, keep, out, true); };
}

KERNEL(aclnnCumsum, const aclTensor *self, int64_t dim, int dtype, aclTensor *out) {
  PLAN {
    require_dtype(self, "self", NUMBERS);
    require(dtype == out->dtype, "out is %s, and dtype says %s", dtype_name(out->dtype), dtype_name(dtype));
    require_shape(out, "out", self->shape);
    int64_t axis = axis_of(dim, self->shape.size(), "dim"), side = self->shape.empty() ? 1 : self->shape[axis], inner = 1;
    for (size_t i = axis + 1; i < self->shape.size(); ++i) inner *= self->shape[i];
    return [=] {
      in_wide_type({dtype}, [&](auto zero) {
        std::vector<decltype(zero)> values = fetch<decltype(zero)>(self, self->shape, dtype);
        for (size_t i = inner; i < values.size(); ++i)
          if (static_cast<int64_t>(i) / inner % side) values[i] += values[i - inner];
        store(out, values, dtype);
      });
    };
  };
}

// MindSpore's ReduceMean and ReduceSum by the older interface: the dimensions are the second input.
LEGACY(ReduceMean) {
  Shape dims = read<int64_t>(&inputs[1]);
  reduce(&inputs[0], dims, attributes.number("keep_dims", 0), inputs[0].dtype, &outputs[0], MEAN)();
}
LEGACY(ReduceSum) {
  Shape dims = read<int64_t>(&inputs[1]);
  reduce(&inputs[0], dims, attributes.number("keep_dims", 0), inputs[0].dtype, &outputs[0], SUM)();
}

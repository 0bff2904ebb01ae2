// What operators that go element by element share: the dtype that operands are brought to, and the loop over elements.
#pragma once

#include <tuple>

#include "arrays.h"

using Dtypes = std::initializer_list<int>;
inline constexpr Dtypes FLOATS{F32, F16, BF16};
inline constexpr Dtypes REALS{F32, F16, BF16, F64};
inline constexpr Dtypes NUMBERS{F32, F16, BF16, F64, I8, U8, I16, I32, I64};
inline constexpr Dtypes NUMBERS_AND_BOOL{F32, F16, BF16, F64, I8, U8, I16, I32, I64, BOOL};
inline constexpr Dtypes ANYTHING{F32, F16, BF16, F64, I8, U8, I16, U16, I32, U32, I64, U64, BOOL};
inline constexpr Dtypes INDICES{I32, I64};
constexpr size_t MOST_DIMENSIONS = 8;

// The dtype to which CANN brings two tensors; refuses pairs of its table that have none.
int promote(int a, int b);

// The dtype to which CANN brings a tensor and a scalar: the tensor's, unless only the scalar has a fraction.
int promote(const aclTensor *tensor, const aclScalar *scalar, const aclTensor *out);

// Refuse an output that a result of this dtype is not converted to.
void require_castable(int dtype, const aclTensor *out, const char *name);

// Round to what the dtype holds: halves of floats, integers of whole numbers.
template <class T>
void settle(std::vector<T> &values, int dtype) {
  if (dtype == F16)
    for (T &value : values) value = static_cast<T>(half_to_float(float_to_half(static_cast<float>(value))));
  if (dtype == BF16)
    for (T &value : values) value = static_cast<T>(bfloat_to_float(float_to_bfloat(static_cast<float>(value))));
}

// One number where others have an element for each place.
template <class T>
struct Constant {
  T number;
  T operator[](size_t) const { return number; }
};

// An operand as numbers of the common dtype: a tensor broadcast to the shape, or a scalar.
template <class T>
std::vector<T> fetch(const aclTensor *tensor, const Shape &shape, int common) {
  std::vector<T> values = read<T>(tensor, shape);
  if (tensor->dtype != common) settle(values, common);
  return values;
}
template <class T>
Constant<T> fetch(const aclScalar &scalar, const Shape &, int common) {
  std::vector<T> values{value<T>(&scalar)};
  settle(values, common);
  return {values[0]};
}

// Write results of the common dtype.
template <class T>
void store(const aclTensor *out, std::vector<T> &values, int common) {
  if (out->dtype != common) settle(values, common);
  write(const_cast<aclTensor *>(out), values);
}

inline Shape shape_of(const aclTensor *tensor) {
  require(tensor != nullptr, "a tensor is missing");
  require_rank(tensor, "a tensor", 0, MOST_DIMENSIONS);
  return tensor->shape;
}
inline Shape shape_of(const aclScalar &) { return {}; }

template <class... Inputs>
Shape common_shape(const Inputs &...inputs) {
  Shape shape;
  for (const Shape &other : {shape_of(inputs)...}) shape = broadcast(shape, other);
  return shape;
}

// out = f(inputs...), element by element: tensors are broadcast, scalars stand for all; computed in the wide type of
// the common dtype, to which inputs and result are rounded. f takes and gives that type: float, double or int64_t.
template <class F, class... Inputs>
Run combine(const aclTensor *out, int common, F f, Inputs... inputs) {
  Shape shape = common_shape(inputs...);
  require_shape(out, "out", shape);
  return [=] {
    in_wide_type({common}, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> result(elements(shape));
      std::apply(
          [&](const auto &...column) {
            in_parallel(result.size(), 8, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) result[i] = static_cast<T>(f(column[i]...));
            });
          },
          std::make_tuple(fetch<T>(inputs, shape, common)...));
      store(out, result, common);
    });
  };
}

// The same where results are true or false: the common dtype is only that of the inputs.
template <class F, class... Inputs>
Run judge(const aclTensor *out, int common, F f, Inputs... inputs) {
  Shape shape = common_shape(inputs...);
  require_shape(out, "out", shape);
  return [=] {
    in_wide_type({common}, [&](auto zero) {
      using T = decltype(zero);
      std::vector<int64_t> result(elements(shape));
      std::apply(
          [&](const auto &...column) {
            for (size_t i = 0; i < result.size(); ++i) result[i] = f(column[i]...);
          },
          std::make_tuple(fetch<T>(inputs, shape, common)...));
      write(const_cast<aclTensor *>(out), result);
    });
  };
}

// A scalar by value: MindSpore destroys its own once the kernel is planned.
inline aclScalar kept(const aclScalar *scalar, const char *name) {
  require(scalar != nullptr, "%s is missing", name);
  return *scalar;
}

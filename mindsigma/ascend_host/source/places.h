// Places that tensors name. One beyond the end, which a device reads or writes without a word, is refused.
#pragma once

#include "mapping.h"

inline constexpr Dtypes INDEXED{F32, F16, BF16, I64, I32, BOOL, I8, U8, F64, I16};
inline constexpr Dtypes NAMES{I64, I32, BOOL};

inline int64_t checked(int64_t place, int64_t side) {
  int64_t at = place < 0 ? place + side : place;
  require(at >= 0 && at < side, "index %ld of %ld", place, side);
  return at;
}

// A packed tensor around one of its dimensions.
struct Around {
  int64_t outer = 1, side = 1, inner = 1;
  Around(const Shape &shape, int64_t axis) {
    for (size_t i = 0; i < shape.size(); ++i) (int64_t(i) < axis ? outer : int64_t(i) > axis ? inner : side) *= shape[i];
  }
};

// Places in elements that index tensors name, in the order of the result: tensors of whole numbers, masks, and empty
// ones for dimensions that are taken whole. Named dimensions that lie apart move to the front.
struct Named {
  Shape shape;
  std::vector<int64_t> places;
  Named(const aclTensor *self, const std::vector<aclTensor *> &indices);
};

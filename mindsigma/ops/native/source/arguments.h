// What MindSpore hands over: int f(count, tensors, ranks, shapes, dtypes, stream, extra), 0 if all went well.
// The tensors are those of mindsigma/ops/native/operations.py, which documents them, and the results.
#pragma once
#include <cstdint>
#include <cstring>

struct Arguments {
  int count;
  void** tensors;
  int* ranks;
  int64_t** shapes;

  long size(int i, int axis) const { return shapes[i][axis < 0 ? ranks[i] + axis : axis]; }
  long elements(int i) const {
    long product = 1;
    for (int axis = 0; axis < ranks[i]; axis++) product *= shapes[i][axis];
    return product;
  }
  const float* floats(int i) const { return static_cast<const float*>(tensors[i]); }
  const int32_t* numbers(int i) const { return static_cast<const int32_t*>(tensors[i]); }
  float* floats_out(int i) const { return static_cast<float*>(tensors[i]); }
  float* result() const { return floats_out(count - 1); }
};

inline float as_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (...) {
    return 1;
  }
}

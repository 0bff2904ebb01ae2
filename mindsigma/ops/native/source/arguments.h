// What MindSpore hands over: int f(count, tensors, ranks, shapes, dtypes, stream, extra), 0 if all went well, else 1, or
// EMPTY if there is no answer, as an input has no elements.
// The tensors are those of mindsigma/ops/native/operations.py, which documents them, and the results.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>

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

constexpr int EMPTY = 2;

// Call f, the body of a function whose last `results` tensors are its results, unless some tensor has no elements: no
// rows, no images. Results of no elements are then ready; what is a sum over rows (`sums`) is zero; others have no answer.
template <class F>
int guarded(const Arguments& a, int results, bool sums, F f) {
  bool some = false, left = false;
  for (int i = 0; i < a.count; i++) some |= a.elements(i) == 0;
  for (int i = a.count - results; some && i < a.count; i++) {
    left |= a.elements(i) != 0;
    if (sums) memset(a.tensors[i], 0, a.elements(i) * 4);
  }
  if (some) return left && !sums ? EMPTY : 0;
  try {
    f();
    return 0;
  } catch (...) {
    return 1;
  }
}

#include "reduce.h"

#include <algorithm>

#include "arrays.h"

namespace {

constexpr size_t BLOCK = 1024;  // items that are combined at once

struct Bfloat {
  uint16_t bits;
  explicit Bfloat(float value) : bits(float_to_bfloat(value)) {}
  explicit operator float() const { return bfloat_to_float(bits); }
};

float sum(float a, float b) { return a + b; }
float product(float a, float b) { return a * b; }
int64_t sum(int64_t a, int64_t b) { return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); }
int64_t product(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

// Items of T, combined as W.
template <class T, class W, class F>
void combine(const std::vector<const char *> &from, char *to, size_t count, F f) {
  W wide[BLOCK];
  for (size_t start = 0; start < count; start += BLOCK) {
    size_t size = std::min(BLOCK, count - start);
    for (size_t rank = 0; rank < from.size(); ++rank) {
      const T *items = reinterpret_cast<const T *>(from[rank]) + start;
      for (size_t i = 0; i < size; ++i) {
        W item = static_cast<W>(items[i]);
        wide[i] = rank ? f(wide[i], item) : item;
      }
    }
    T *out = reinterpret_cast<T *>(to) + start;
    for (size_t i = 0; i < size; ++i) out[i] = static_cast<T>(wide[i]);
  }
}

template <class T, class W>
void combine(const std::vector<const char *> &from, char *to, size_t count, int reduction) {
  switch (reduction) {
    case SUM: return combine<T, W>(from, to, count, [](W a, W b) { return sum(a, b); });
    case PRODUCT: return combine<T, W>(from, to, count, [](W a, W b) { return product(a, b); });
    case MAXIMUM: return combine<T, W>(from, to, count, [](W a, W b) { return a < b ? b : a; });
    case MINIMUM: return combine<T, W>(from, to, count, [](W a, W b) { return b < a ? b : a; });
  }
}

}  // namespace

void reduce(const std::vector<const char *> &from, char *to, size_t count, int kind, int reduction) {
  switch (kind) {
    case INT8: return combine<int8_t, int64_t>(from, to, count, reduction);
    case INT16: return combine<int16_t, int64_t>(from, to, count, reduction);
    case INT32: return combine<int32_t, int64_t>(from, to, count, reduction);
    case INT64: return combine<int64_t, int64_t>(from, to, count, reduction);
    case FP16: return combine<_Float16, float>(from, to, count, reduction);
    case FP32: return combine<float, float>(from, to, count, reduction);
    case BFP16: return combine<Bfloat, float>(from, to, count, reduction);
  }
}

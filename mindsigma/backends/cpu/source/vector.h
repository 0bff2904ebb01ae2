// Vectors of the widest registers that the compiler was told of, and the functions of them that the kernels need.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats of a vector
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float V __attribute__((vector_size(VL * 4)));
typedef int32_t VI __attribute__((vector_size(VL * 4)));

static inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

static inline void store(float* p, V v) { memcpy(p, &v, sizeof(V)); }

// The first n <= VL floats at p, most often VL, then zeros.
static inline V get(const float* p, long n) {
  if (n == VL) return load(p);
  V v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
}

static inline void put(float* p, V v, long n) { n == VL ? store(p, v) : void(memcpy(p, &v, n * sizeof(float))); }

static inline V spread(float x) { return x - V{}; }

static inline V larger(V a, V b) { return a > b ? a : b; }

// v with its lanes moved down by STEP.
template <int STEP>
static inline V lowered(V v) {
  VI place;
  for (int i = 0; i < VL; i++) place[i] = (i + STEP) % VL;
  return __builtin_shuffle(v, place);
}

// f of all elements of a vector, in a fixed order.
template <class F>
static inline float fold(V v, F f) {
  if (VL >= 16) v = f(v, lowered<8 % VL>(v));
  if (VL >= 8) v = f(v, lowered<4 % VL>(v));
  v = f(v, lowered<2>(v));
  return f(v, lowered<1>(v))[0];
}

static inline float sum_of(V v) {
  return fold(v, [](V a, V b) { return a + b; });
}

// Call f(i, n) for the n <= VL places from i on of `width`, one group after the other.
template <class F>
static inline void each_vector(long width, F f) {
  long i = 0;
  for (; i + VL <= width; i += VL) f(i, long(VL));
  if (i < width) f(i, width - i);
}

// Sum of what f(i, n) gives for the n <= VL places from i on.
template <class F>
static inline float sum(long width, F f) {
  V total = {};
  each_vector(width, [&](long i, long n) { total += f(i, n); });
  return sum_of(total);
}

// The first n elements of v, then zeros.
static inline V masked(V v, long n) {
  for (long i = n; i < VL; i++) v[i] = 0;
  return v;
}

// e^x to about one unit in the last place (polynomial of Cephes' expf); 0 below -87.7, NaN for NaN.
static inline V exponential(V x) {
  x = x < -88.0f ? spread(-88.0f) : x;
  x = x > 88.0f ? spread(88.0f) : x;
  const V shift = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  V n = x * 1.44269504088896341f + shift;
  VI bits;
  memcpy(&bits, &n, sizeof(V));
  n -= shift;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  V y = p * (r * r) + r + 1.0f;
  bits = (bits - 0x4B400000 + 127) << 23;
  V power;
  memcpy(&power, &bits, sizeof(V));
  return y * power;
}

static inline V silu(V x) { return x / (1.0f + exponential(-x)); }

// GELU in the tanh approximation: tanh(u) = 2 / (1 + e^-2u) - 1.
static inline V gelu(V x) {
  return x / (1.0f + exponential(x * (-1.5957691216057308f - 0.071354816272400f * (x * x))));
}

// Derivative of `gelu` at x, and its value.
static inline V gelu_slope(V x, V& value) {
  const V square = x * x;
  const V gate = 1.0f / (1.0f + exponential(x * (-1.5957691216057308f - 0.071354816272400f * square)));
  value = x * gate;
  return gate + value * (1.0f - gate) * (1.5957691216057308f + 3 * 0.071354816272400f * square);
}

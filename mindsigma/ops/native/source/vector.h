// Vectors of the widest registers that the compiler was told of, and the functions of them that the kernels need.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats of a vector
constexpr int MR = 8;   // rows of a register tile; NV vectors are its columns
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int MR = 4;
#elif defined(__aarch64__)
constexpr int VL = 4;
constexpr int MR = 8;
#else
constexpr int VL = 4;
constexpr int MR = 4;
#endif
constexpr int NV = 3;
constexpr int NR = NV * VL;

typedef float V __attribute__((vector_size(VL * 4)));
typedef int32_t VI __attribute__((vector_size(VL * 4)));

static inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

static inline void store(float* p, V v) { memcpy(p, &v, sizeof(V)); }

// The first n floats at p, then zeros.
static inline V load_part(const float* p, long n) {
  V v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
}

static inline void store_part(float* p, V v, long n) { memcpy(p, &v, n * sizeof(float)); }

// The same for n <= VL, most often VL.
static inline V get(const float* p, long n) { return n == VL ? load(p) : load_part(p, n); }

static inline void put(float* p, V v, long n) {
  if (n == VL)
    store(p, v);
  else
    store_part(p, v, n);
}

static inline V spread(float x) { return x - V{}; }

static inline V larger(V a, V b) { return a > b ? a : b; }

// v with its lanes moved down by STEP.
template <int STEP>
static inline V lowered(V v) {
  VI place;
  for (int i = 0; i < VL; i++) place[i] = (i + STEP) % VL;
  return __builtin_shuffle(v, place);
}

// Sums and maxima over a vector, in a fixed order.
static inline float sum_of(V v) {
  if (VL >= 16) v += lowered<8 % VL>(v);
  if (VL >= 8) v += lowered<4 % VL>(v);
  v += lowered<2>(v);
  v += lowered<1>(v);
  return v[0];
}

static inline float largest_of(V v) {
  if (VL >= 16) v = larger(v, lowered<8 % VL>(v));
  if (VL >= 8) v = larger(v, lowered<4 % VL>(v));
  v = larger(v, lowered<2>(v));
  v = larger(v, lowered<1>(v));
  return v[0];
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

// 2^x for x <= 0, to about one unit in the last place (polynomial of Cephes' exp2f); 2^-126 below that, NaN for NaN.
static inline V power_of_two(V x) {
  x = x < -126.0f ? spread(-126.0f) : x;
  const V shift = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  V n = x + shift;
  VI bits;
  memcpy(&bits, &n, sizeof(V));
  const V r = x - (n - shift);
  V p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  bits = (bits + 127) << 23;
  V power;
  memcpy(&power, &bits, sizeof(V));
  return p * power;
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

template <int STEP>
static inline void exchange(V& a, V& b) {
  VI first, second;
  for (int e = 0; e < VL; e++) {
    first[e] = e & STEP ? VL + e - STEP : e;
    second[e] = e & STEP ? VL + e : e + STEP;
  }
  V c = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = c;
}

template <int STEP>
static inline void exchange_all(V (&rows)[VL]) {
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++)
    if ((i & STEP) == 0) exchange<STEP>(rows[i], rows[i + STEP]);
}

// Transpose a square of VL vectors.
static inline void transpose(V (&rows)[VL]) {
  if (VL >= 16) exchange_all<VL >= 16 ? 8 : 1>(rows);
  if (VL >= 8) exchange_all<VL >= 8 ? 4 : 1>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

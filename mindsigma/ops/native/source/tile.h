// The register tile that every product is made of, and the layout of its second operand.
#pragma once
#include "vector.h"

// acc[i][j] = sum of a[i * stride + p] * b[p][j] over p < depth; b is a panel (depth, NR). TURNED: a[p * stride + i].
template <int N, bool TURNED = false>
static inline void multiply(const float* a, long stride, const float* b, long depth, V (&acc)[MR][N]) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) acc[i][j] = V{};
  for (long p = 0; p < depth; p++) {
    V row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j] = load(b + p * NR + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      V x = spread(TURNED ? a[p * stride + i] : a[i * stride + p]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) acc[i][j] += x * row[j];
    }
  }
}

// to (MR, N * VL), rows `step` apart, = a (MR, depth) times a panel.
template <int N>
static inline void product(const float* a, long stride, const float* panel, long depth, float* to, long step) {
  V acc[MR][N];
  multiply<N>(a, stride, panel, depth, acc);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) store(to + i * step + j * VL, acc[i][j]);
}

// A panel (depth, NR): the transpose of `rows` <= NR rows of w, `stride` apart, with zeros after them.
static inline void pack_rows(const float* w, long stride, long rows, long depth, float* panel) {
  for (int first = 0; first < NR; first += VL) {
    const float* from = w + first * stride;
    long count = rows - first < VL ? rows - first : VL;
    long p = 0;
    if (count == VL) {
      for (; p + VL <= depth; p += VL) {
        V square[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) square[i] = load(from + i * stride + p);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) store(panel + (p + i) * NR + first, square[i]);
      }
    }
    for (; p < depth; p++)
      for (int i = 0; i < VL; i++) panel[p * NR + first + i] = i < count ? from[i * stride + p] : 0.0f;
  }
}

// A panel (depth, NR): `width` <= NR columns of w, whose rows are `stride` apart, with zeros after them.
static inline void pack_columns(const float* w, long stride, long width, long depth, float* panel) {
  for (long p = 0; p < depth; p++) {
    const float* from = w + p * stride;
    float* to = panel + p * NR;
    if (width == NR) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) store(to + j * VL, load(from + j * VL));
    } else {
      for (long j = 0; j < NR; j++) to[j] = j < width ? from[j] : 0.0f;
    }
  }
}

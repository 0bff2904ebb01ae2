// Matrix products with the normalisation of their input and the pointwise work on their output in the same pass.
#include "linear.h"

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "tile.h"

namespace {

constexpr long DEPTH = 384;      // of a packed block of the weight: a panel of it stays in the second cache
constexpr long ROWS = 768;       // of a block of x
constexpr long CHUNK = 4096;     // rows that are normalised before they are multiplied
constexpr long PANELS = 8;       // of a block of the weight

void normalise_row(const Linear& l, long row, float* to) {
  const float* x = l.x + row * l.in;
  const long whole = l.in / VL * VL;
  float mean = 0;
  if (l.scale) {
    V sum = {};
    for (long i = 0; i < whole; i += VL) sum += load(x + i);
    float total = sum_of(sum);
    for (long i = whole; i < l.in; i++) total += x[i];
    mean = total / l.in;
  }
  V squares = {};
  for (long i = 0; i < whole; i += VL) {
    V d = load(x + i) - mean;
    squares += d * d;
  }
  float total = sum_of(squares);
  for (long i = whole; i < l.in; i++) total += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(total / l.in + l.eps);
  if (l.scale) {
    const float* scale = l.scale + row / l.rows_of_image * l.step;
    const float* shift = l.shift + row / l.rows_of_image * l.step;
    for (long i = 0; i < whole; i += VL)
      store(to + i, (load(x + i) - mean) * inverse * load(scale + i) + load(shift + i));
    for (long i = whole; i < l.in; i++) to[i] = (x[i] - mean) * inverse * scale[i] + shift[i];
  } else {
    for (long i = 0; i < whole; i += VL) store(to + i, load(x + i) * inverse * load(l.norm_weight + i));
    for (long i = whole; i < l.in; i++) to[i] = x[i] * inverse * l.norm_weight[i];
  }
}

template <int N, bool WHOLE>
inline V get(const float* p, int j, long width) {
  if (WHOLE || j + 1 < N) return load(p + j * VL);
  return load_part(p + j * VL, width - j * VL);
}

template <int N, bool WHOLE>
inline void put(float* p, int j, long width, V v) {
  if (WHOLE || j + 1 < N)
    store(p + j * VL, v);
  else
    store_part(p + j * VL, v, width - j * VL);
}

// A tile of y at (row, column) of `height` <= MR rows and `width` <= N * VL columns.
template <int N, bool WHOLE>
void tile(const Linear& l, const float* a, long stride, const float* panel, long depth, bool first, bool last, long row,
          long column, long height, long width) {
  V acc[MR][N];
  float* y = l.y + row * l.out + column;
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) acc[i][j] = V{};
  multiply<N>(a, stride, panel, depth, acc);
  if (!first)
    for (int i = 0; i < height; i++)
      for (int j = 0; j < N; j++) acc[i][j] += get<N, WHOLE>(y + i * l.out, j, width);
  if (last) {
    for (int i = 0; i < height; i++) {
      const long place = (row + i) * l.out + column;
      for (int j = 0; j < N; j++) {
        V v = acc[i][j];
        if (l.bias) v += get<N, WHOLE>(l.bias + column, j, width);
        if (l.kept) put<N, WHOLE>(l.kept + place, j, width, v);
        if (l.gelu) v = gelu(v);
        if (l.gelu_input) {
          V value;
          v *= gelu_slope(get<N, WHOLE>(l.gelu_input + place, j, width), value);
          put<N, WHOLE>(l.gelu_output + place, j, width, value);
        }
        if (l.factor) v *= get<N, WHOLE>(l.factor + place, j, width);
        if (l.gate) v *= get<N, WHOLE>(l.gate + (row + i) / l.rows_of_image * l.step + column, j, width);
        if (l.residual) v += get<N, WHOLE>(l.residual + place, j, width);
        acc[i][j] = v;
      }
    }
  }
  for (int i = 0; i < height; i++)
    for (int j = 0; j < N; j++) put<N, WHOLE>(y + i * l.out, j, width, acc[i][j]);
}

template <int N>
void tile_of(const Linear& l, const float* a, long stride, const float* panel, long depth, bool first, bool last,
             long row, long column, long height, long width) {
  if (width == N * VL)
    tile<N, true>(l, a, stride, panel, depth, first, last, row, column, height, width);
  else
    tile<N, false>(l, a, stride, panel, depth, first, last, row, column, height, width);
}

// Columns [first_panel * NR, ...) of `panels` panels, rows [begin, end).
void block(const Linear& l, const float* x, long x_row, long begin, long end, long first_panel, long panels) {
  const long pieces = (l.in + DEPTH - 1) / DEPTH;
  const long depth = ((l.in + pieces - 1) / pieces + VL - 1) / VL * VL;
  float* packed = scratch(1, PANELS * NR * depth);
  float spare[MR * DEPTH + MR * VL];  // rows of an incomplete tile
  for (long k = 0; k < l.in; k += depth) {
    const long count = std::min(depth, l.in - k);
    for (long p = 0; p < panels; p++) {
      const long column = (first_panel + p) * NR;
      const long width = std::min<long>(NR, l.out - column);
      if (l.turned)
        pack_columns(l.weight + k * l.out + column, l.out, width, count, packed + p * NR * depth);
      else
        pack_rows(l.weight + column * l.in + k, l.in, width, count, packed + p * NR * depth);
    }
    for (long row = begin; row < end; row += MR) {
      const long height = std::min<long>(MR, end - row);
      const float* a = x + (row - x_row) * l.in + k;
      long stride = l.in;
      if (height < MR) {
        for (int i = 0; i < MR; i++)
          for (long j = 0; j < count; j++) spare[i * count + j] = i < height ? a[i * l.in + j] : 0.0f;
        a = spare;
        stride = count;
      }
      for (long p = 0; p < panels; p++) {
        const long column = (first_panel + p) * NR, width = std::min<long>(NR, l.out - column);
        const float* panel = packed + p * NR * depth;
        const bool first = k == 0, last = k + count == l.in;
        if (width > 2 * VL)
          tile_of<3>(l, a, stride, panel, count, first, last, row, column, height, width);
        else if (width > VL)
          tile_of<2>(l, a, stride, panel, count, first, last, row, column, height, width);
        else
          tile_of<1>(l, a, stride, panel, count, first, last, row, column, height, width);
      }
    }
  }
}

// Rows [begin, end) of the input.
void normalise_rows(const Linear& l, long begin, long end, float* to) {
  parallel((end - begin + 15) / 16, [&](long task) {
    const long first = begin + task * 16;
    for (long row = first; row < std::min(end, first + 16); row++) normalise_row(l, row, to + (row - begin) * l.in);
  });
}

}  // namespace

void normalise(const Linear& l, float* to) { normalise_rows(l, 0, l.rows, to); }

void apply(const Linear& l) {
  const bool norm = l.scale || l.norm_weight;
  const long panels = (l.out + NR - 1) / NR, threads = thread_count();
  for (long start = 0; start < l.rows; start += CHUNK) {
    const long stop = std::min(l.rows, start + CHUNK), rows = stop - start;
    const float* x = l.x + start * l.in;
    if (norm) {
      float* normalised = scratch(0, rows * l.in);
      normalise_rows(l, start, stop, normalised);
      x = normalised;
    }
    const long most = std::clamp<long>(panels / (2 * threads), 1, PANELS);
    long across = (panels + most - 1) / most, down = (rows + ROWS - 1) / ROWS;
    if (across * down < threads) down = std::min((rows + 63) / 64, (threads + across - 1) / across);
    while (across < panels && across * down % threads) across++;  // so that no thread waits for the last task
    const long height = ((rows + down - 1) / down + MR - 1) / MR * MR;
    parallel(across * down, [&](long task) {
      const long begin = start + task % down * height, end = std::min(stop, begin + height);
      const long first = panels * (task / down) / across, next = panels * (task / down + 1) / across;
      if (begin < end) block(l, x, start, begin, end, first, next - first);
    });
  }
}

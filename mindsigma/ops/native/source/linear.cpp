// Matrix products with the normalisation of their input and the pointwise work on their output in the same pass.
#include "linear.h"

#include <algorithm>
#include <cmath>

#include "amx.h"
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

// Sums to a tile of y at (row, column) of `height` <= MR rows and `width` <= N * VL columns: with the sums that are
// there, unless these are the first, and with all that comes after the product, if they are the last.
template <int N, bool WHOLE>
void write(const Linear& l, V (&acc)[MR][N], bool first, bool last, long row, long column, long height, long width) {
  float* y = l.y + row * l.out + column;
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

// A tile of y.
template <int N, bool WHOLE>
void tile(const Linear& l, const float* a, long stride, const float* panel, long depth, bool first, bool last,
          long row, long column, long height, long width) {
  V acc[MR][N];
  multiply<N>(a, stride, panel, depth, acc);
  write<N, WHOLE>(l, acc, first, last, row, column, height, width);
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

// The same by AMX.

constexpr long STEPS = 18;                           // of a piece of the depth, at most
constexpr long PACKED = 12 * STEPS * PARTS_OF_STEP;  // floats of a block of the weight: it stays in the second cache
constexpr long SPLIT = 4 << 20;                      // floats of rows that are split before they are multiplied
constexpr long COST_OF_PANEL = 2;                    // of splitting a panel of the weight, in products of blocks

// Tasks that share `panels` of columns and `blocks` of rows among threads, so that all end at about the same time.
struct Shares {
  long across = 1, down = 1;

  Shares(long panels, long blocks, long most) {
    const long threads = thread_count(), fewest = (panels + most - 1) / most;
    long least = -1;
    for (long d = 1; d <= std::min(blocks, threads); d++) {
      const long rounds = (fewest * d + threads - 1) / threads;
      for (long round = rounds; round < rounds + 3; round++) {
        const long a = std::clamp(round * threads / d, fewest, panels);  // as many as fill the rounds
        const long cost_of_task = (panels + a - 1) / a * ((blocks + d - 1) / d + COST_OF_PANEL);
        const long cost = (a * d + threads - 1) / threads * cost_of_task;
        if (least < 0 || cost < least) least = cost, across = a, down = d;
      }
    }
  }
};

// Columns of panels [first_panel, ...), blocks [begin, end) of rows; `left`: rows of blocks from `origin` on, split.
void block_by_amx(const Linear& l, const float* left, long origin, long begin, long end, long first_panel,
                  long panels) {
  const Tiles tiles;
  const long steps = (l.in + AMX_STEP - 1) / AMX_STEP, pieces = (steps + STEPS - 1) / STEPS;
  const long most = (steps + pieces - 1) / pieces;
  float* packed = scratch(1, panels * most * PARTS_OF_STEP);
  alignas(64) float product[AMX_SIDE * AMX_SIDE];
  for (long step = 0; step < steps; step += most) {
    const long count = std::min(most, steps - step), k = step * AMX_STEP, depth = std::min(count * AMX_STEP, l.in - k);
    for (long p = 0; p < panels; p++) {
      const long column = (first_panel + p) * AMX_SIDE;
      split_right(l.weight + (l.turned ? k * l.out + column : column * l.in + k), l.turned ? l.out : l.in,
                  std::min(AMX_SIDE, l.out - column), depth, l.turned, packed + p * most * PARTS_OF_STEP);
    }
    const bool first = step == 0, last = step + count == steps;
    for (long block = begin; block < end; block++)
      for (long p = 0; p < panels; p++) {
        multiply_parts(left + ((block - origin) * steps + step) * PARTS_OF_STEP, packed + p * most * PARTS_OF_STEP,
                       count, product);
        const long column = (first_panel + p) * AMX_SIDE, width = std::min(AMX_SIDE, l.out - column);
        for (long row = block * AMX_SIDE; row < std::min(l.rows, block * AMX_SIDE + AMX_SIDE); row += MR) {
          const float* from = product + row % AMX_SIDE * AMX_SIDE;
          const long height = std::min<long>(MR, l.rows - row);
          if (width > VL) {
            V acc[MR][2];
            for (int i = 0; i < MR; i++)
              for (int j = 0; j < 2; j++) acc[i][j] = load(from + i * AMX_SIDE + j * VL);
            if (width == AMX_SIDE)
              write<2, true>(l, acc, first, last, row, column, height, width);
            else
              write<2, false>(l, acc, first, last, row, column, height, width);
          } else {
            V acc[MR][1];
            for (int i = 0; i < MR; i++) acc[i][0] = load(from + i * AMX_SIDE);
            write<1, false>(l, acc, first, last, row, column, height, width);
          }
        }
      }
  }
}

void apply_by_amx(const Linear& l) {
  const bool norm = l.scale || l.norm_weight;
  const long steps = (l.in + AMX_STEP - 1) / AMX_STEP;
  const long panels = (l.out + AMX_SIDE - 1) / AMX_SIDE, blocks = (l.rows + AMX_SIDE - 1) / AMX_SIDE;
  const long chunk = std::max<long>(1, SPLIT / (steps * PARTS_OF_STEP));
  for (long start = 0; start < blocks; start += chunk) {
    const long stop = std::min(blocks, start + chunk);
    float* left = scratch(0, (stop - start) * steps * PARTS_OF_STEP);
    parallel(stop - start, [&](long i) {
      const long row = (start + i) * AMX_SIDE, rows = std::min(AMX_SIDE, l.rows - row);
      const float* x = l.x + row * l.in;
      if (norm) {
        float* normalised = scratch(3, AMX_SIDE * l.in);
        for (long j = 0; j < rows; j++) normalise_row(l, row + j, normalised + j * l.in);
        x = normalised;
      }
      split_left(x, l.in, rows, l.in, left + i * steps * PARTS_OF_STEP);
    });
    const long most = std::clamp<long>(PACKED / (std::min(steps, STEPS) * PARTS_OF_STEP), 1, 16);
    const Shares shares(panels, stop - start, most);
    parallel(shares.across * shares.down, [&](long task) {
      const long down = task % shares.down, across = task / shares.down;
      const long begin = start + (stop - start) * down / shares.down;
      const long end = start + (stop - start) * (down + 1) / shares.down;
      const long first = panels * across / shares.across, next = panels * (across + 1) / shares.across;
      block_by_amx(l, left, start, begin, end, first, next - first);
    });
  }
}

}  // namespace

void normalise(const Linear& l, float* to) { normalise_rows(l, 0, l.rows, to); }

void apply(const Linear& l) {
  // By the rows of an image, so that what it gets does not depend on the others; a text's are those it is padded to.
  if (l.rows_of_image >= 2 * AMX_SIDE && has_amx()) return apply_by_amx(l);
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

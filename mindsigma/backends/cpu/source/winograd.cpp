// 3x3 convolution by Winograd's minimal filtering F(4x4, 3x3) (arXiv 1509.09308): 36 products of matrices make the 16
// pixels of every tile, where the direct way makes 144. The points are 0, +-11/16, +-11/8 and infinity instead of 0,
// +-1, +-2 and infinity: fp32 rounds a third as much with them, still a few times what it does the direct way.
#include <algorithm>

#include "images.h"
#include "pool.h"
#include "products.h"
#include "vector.h"

namespace {

constexpr int SIDE = 6, PLACES = SIDE * SIDE;  // of the transformed tile
constexpr int MADE = 4;                        // rows and columns of pixels that a tile makes
constexpr long TOGETHER = 6;                   // groups of a task, at most
constexpr float A = 0.6875f, B = 1.375f, AA = A * A, BB = B * B;

// Pixels of a row that the tiles of a vector read: MADE * VL + 2, filled up.
constexpr int READ = (MADE + 1) * VL;

struct Group {              // VL tiles of a row of tiles
  long image, row, column;  // of its first pixel
};

struct Layout {
  long across, down, groups;
  explicit Layout(const Convolution& c) {
    across = (c.width + MADE * VL - 1) / (MADE * VL);
    down = (c.height + MADE - 1) / MADE;
    groups = c.batch * down * across;
  }
  Group group(long i) const { return {i / (across * down), i / across % down * MADE, i % across * MADE * VL}; }
};

// Six rows or columns of a tile to the values at the points.
inline void to_points(const V (&d)[SIDE], V (&t)[SIDE]) {
  const V even_a = d[4] - d[2] * BB, odd_a = (d[3] - d[1] * BB) * A;
  const V even_b = d[4] - d[2] * AA, odd_b = (d[3] - d[1] * AA) * B;
  t[0] = d[4] + d[0] * (AA * BB) - d[2] * (AA + BB);
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = d[5] + d[1] * (AA * BB) - d[3] * (AA + BB);
}

// Values at the points to four rows or columns.
inline void from_points(const V (&m)[SIDE], V (&y)[MADE]) {
  const V sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = difference_a * A + difference_b * B;
  y[2] = sum_a * AA + sum_b * BB;
  y[3] = difference_a * (A * AA) + difference_b * (B * BB) + m[5];
}

// Three rows or columns of a filter to the values at the points.
inline void filter_to_points(const V (&g)[3], V (&t)[SIDE]) {
  constexpr double a = A, b = B, aa = a * a, bb = b * b;
  constexpr float zero = 1 / (aa * bb), of_a = 1 / (2 * aa * (aa - bb)), of_b = 1 / (2 * bb * (bb - aa));
  const V even_a = g[0] + g[2] * AA, odd_a = g[1] * A, even_b = g[0] + g[2] * BB, odd_b = g[1] * B;
  t[0] = g[0] * zero;
  t[1] = (even_a + odd_a) * of_a;
  t[2] = (even_a - odd_a) * of_a;
  t[3] = (even_b + odd_b) * of_b;
  t[4] = (even_b - odd_b) * of_b;
  t[5] = g[2];
}

template <bool ODD>
inline V every_other(V a, V b) {
  VI place;
  for (int i = 0; i < VL; i++) place[i] = 2 * i + ODD;
  return __builtin_shuffle(a, b, place);
}

template <bool UPPER>
inline V interleaved(V a, V b) {
  VI place;
  for (int i = 0; i < VL; i++) place[i] = (UPPER ? VL / 2 : 0) + i / 2 + (i % 2 ? VL : 0);
  return __builtin_shuffle(a, b, place);
}

// a without its first element, then element PLACE of b.
template <int PLACE>
inline V followed_by(V a, V b) {
  VI place;
  for (int i = 0; i < VL; i++) place[i] = i + 1 < VL ? i + 1 : VL + PLACE;
  return __builtin_shuffle(a, b, place);
}

// Columns 0 ... 5 of VL tiles that are MADE columns apart.
inline void columns_of(const float* row, V (&d)[SIDE]) {
  const V v0 = load(row), v1 = load(row + VL), v2 = load(row + 2 * VL), v3 = load(row + 3 * VL);
  const V next = load(row + 4 * VL);
  const V even = every_other<false>(v0, v1), odd = every_other<true>(v0, v1);
  const V even_after = every_other<false>(v2, v3), odd_after = every_other<true>(v2, v3);
  d[0] = every_other<false>(even, even_after);
  d[2] = every_other<true>(even, even_after);
  d[1] = every_other<false>(odd, odd_after);
  d[3] = every_other<true>(odd, odd_after);
  d[4] = followed_by<0>(d[0], next);
  d[5] = followed_by<1>(d[1], next);
}

// A channel of VL tiles to their values at the points, `step` apart.
void transform_tiles(const Convolution& c, const Group& g, const float* channel, float* to, long step) {
  float lines[SIDE][READ], rows[SIDE][READ];
  const float* from[SIDE];
  for (int i = 0; i < SIDE; i++) {
    const long row = g.row + i - 1, column = g.column - 1;
    const bool inside = row >= 0 && row < c.height && column >= 0 && column + READ <= c.width && !c.enlarge;
    from[i] = inside ? channel + row * c.width + column : lines[i];
    if (!inside) read_pixels(c, channel, row, column, READ, lines[i]);
  }
  for (int j = 0; j < READ; j += VL) {
    V d[SIDE], t[SIDE];
#pragma GCC unroll 6
    for (int i = 0; i < SIDE; i++) d[i] = load(from[i] + j);
    to_points(d, t);
#pragma GCC unroll 6
    for (int i = 0; i < SIDE; i++) store(rows[i] + j, t[i]);
  }
  for (int i = 0; i < SIDE; i++) {
    V d[SIDE], t[SIDE];
    columns_of(rows[i], d);
    to_points(d, t);
#pragma GCC unroll 6
    for (int j = 0; j < SIDE; j++, to += step) store(to, t[j]);
  }
}

// Values at the points, `step` apart, to a channel of VL tiles of y.
void make_pixels(const Convolution& c, const Group& g, long channel, const float* from, long step) {
  V across[SIDE][MADE];
  for (int i = 0; i < SIDE; i++) {
    V m[SIDE];
#pragma GCC unroll 6
    for (int j = 0; j < SIDE; j++, from += step) m[j] = load(from);
    from_points(m, across[i]);
  }
  const float bias = c.bias[channel];
  const long place = ((g.image * c.out + channel) * c.height + g.row) * c.width + g.column;
  V made[MADE][MADE];  // [column][row]
#pragma GCC unroll 4
  for (int j = 0; j < MADE; j++) {
    V m[SIDE];
#pragma GCC unroll 6
    for (int i = 0; i < SIDE; i++) m[i] = across[i][j];
    from_points(m, made[j]);
  }
  const long height = std::min<long>(MADE, c.height - g.row), width = c.width - g.column;
#pragma GCC unroll 4
  for (int i = 0; i < MADE; i++) {
    if (i >= height) break;
    const V even = interleaved<false>(made[0][i], made[2][i]), even_after = interleaved<true>(made[0][i], made[2][i]);
    const V odd = interleaved<false>(made[1][i], made[3][i]), odd_after = interleaved<true>(made[1][i], made[3][i]);
    const V line[MADE] = {interleaved<false>(even, odd), interleaved<true>(even, odd),
                          interleaved<false>(even_after, odd_after), interleaved<true>(even_after, odd_after)};
#pragma GCC unroll 4
    for (int j = 0; j < MADE; j++) {
      const long left = std::min<long>(VL, width - j * VL), at = place + i * c.width + j * VL;
      if (left <= 0) break;
      V v = line[j] + bias;
      if (c.residual) v += get(c.residual + at, left);
      put(c.y + at, v, left);
    }
  }
}

// Filters (out, in, 3, 3) to their values at the points (PLACES, out, in).
void transform_filters(const Convolution& c, float* to) {
  parallel(c.out, [&](long out) {
    float* taps = scratch(1, 9 * VL);
    for (long first = 0; first < c.in; first += VL) {
      const long count = std::min<long>(VL, c.in - first);
      const float* weight = c.weight + (out * c.in + first) * 9;
      if (count < VL) std::fill(taps, taps + 9 * VL, 0.0f);
      for (long i = 0; i < count; i++)
        for (int tap = 0; tap < 9; tap++) taps[tap * VL + i] = weight[i * 9 + tap];
      V rows[SIDE][3];
      for (int v = 0; v < 3; v++) {
        const V g[3] = {load(taps + v * VL), load(taps + (3 + v) * VL), load(taps + (6 + v) * VL)};
        V t[SIDE];
        filter_to_points(g, t);
        for (int i = 0; i < SIDE; i++) rows[i][v] = t[i];
      }
      for (int i = 0; i < SIDE; i++) {
        V t[SIDE];
        filter_to_points(rows[i], t);
        for (int j = 0; j < SIDE; j++) put(to + ((i * SIDE + j) * c.out + out) * c.in + first, t[j], count);
      }
    }
  });
}

}  // namespace

bool points_pay(const Convolution& c) {
  const Layout layout{c};  // what an image gets must not depend on the others
  const long pixels = c.height * c.width, places = layout.down * layout.across * VL * PLACES;
  return c.side == 3 && c.out >= 16 && c.in >= 16 && pixels >= 1024 && places <= 5 * pixels;
}

void convolve_by_points(const Convolution& c) {
  const Layout layout{c};
  const Workspace workspace(PLACES * c.out * c.in);
  transform_filters(c, workspace.floats);
  const long most = std::clamp<long>(layout.groups / (2 * thread_count()), 1, TOGETHER);
  parallel((layout.groups + most - 1) / most, [&](long task) {
    const long first = task * most, count = std::min(most, layout.groups - first), step = count * VL;
    // A vector between the places, so that they do not all fall into the same sets of a cache.
    const long of_tiles = c.in * step + VL, of_products = c.out * step + VL;
    float *tiles = scratch(0, PLACES * of_tiles), *products = scratch(1, PLACES * of_products);
    for (long k = 0; k < count; k++) {
      const Group g = layout.group(first + k);
      for (long i = 0; i < c.in; i++) transform_tiles(c, g, c.channel(g.image, i), tiles + i * step + k * VL, of_tiles);
    }
    for (long place = 0; place < PLACES; place++)
      multiply(c.out, step, c.in, {workspace.floats + place * c.out * c.in, c.in}, {tiles + place * of_tiles, step},
               products + place * of_products, step);
    for (long k = 0; k < count; k++)
      for (long out = 0; out < c.out; out++)
        make_pixels(c, layout.group(first + k), out, products + out * step + k * VL, of_products);
  });
}

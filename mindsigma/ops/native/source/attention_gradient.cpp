// Weights are computed again from the logarithms of their sums, a block of queries and keys at a time, so that no
// matrix of them is kept (arXiv 2307.08691, section 3.1.2).
#include "attention_gradient.h"

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "tile.h"

namespace {

constexpr long KEYS = 8 * NR;  // of a block
constexpr long QUERIES = 64;   // of a block

// to (MR, N * VL) += a times a panel; TURNED: the transpose of a (depth, MR).
template <int N, bool TURNED>
void add(const float* a, long stride, const float* panel, long depth, float* to, long step) {
  V acc[MR][N];
  multiply<N, TURNED>(a, stride, panel, depth, acc);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      float* place = to + i * step + j * VL;
      store(place, load(place) + acc[i][j]);
    }
}

// to (MR, columns) = or += a times `columns` columns of panels that are `size` apart.
template <bool ADDED, bool TURNED>
void row_of_tiles(const float* a, long stride, const float* panels, long size, long depth, float* to, long step,
                  long columns) {
  for (long column = 0; column < columns; column += NR, panels += size) {
    const long vectors = (std::min<long>(NR, columns - column) + VL - 1) / VL;
    float* place = to + column;
    if (!ADDED) {
      if (vectors == 3)
        product<3>(a, stride, panels, depth, place, step);
      else if (vectors == 2)
        product<2>(a, stride, panels, depth, place, step);
      else
        product<1>(a, stride, panels, depth, place, step);
    } else if (vectors == 3) {
      add<3, TURNED>(a, stride, panels, depth, place, step);
    } else if (vectors == 2) {
      add<2, TURNED>(a, stride, panels, depth, place, step);
    } else {
      add<1, TURNED>(a, stride, panels, depth, place, step);
    }
  }
}

long up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// One head of one image.
struct Head {
  const AttentionGradient& g;
  const Attention& a = g.forward;
  long image, head;
  const std::vector<int>& kept;
  long count = kept.empty() ? a.keys : kept.size();
  long width = a.width, padded = up(width, VL), panels = (width + NR - 1) / NR;
  long rows = up(count, KEYS);
  // Of all keys and values: the transposes as panels (width, NR), the keys as panels (KEYS, NR) of a block, sums (rows,
  // padded). Of a block of queries: copies (QUERIES, width), panels (QUERIES, NR), weights and slopes (QUERIES, KEYS).
  float *keys, *values, *panelled, *dk, *dv;
  float *q, *dout, *q_panels, *dout_panels, *weights, *slopes, *dq;

  long of_key(long i) const { return kept.empty() ? i : kept[i]; }

  static long floats(const Attention& a) {
    const long rows = up(a.keys, KEYS), panels = (a.width + NR - 1) / NR, padded = up(a.width, VL);
    return rows * (2 * a.width + NR * panels + 2 * padded) +
           QUERIES * (2 * a.width + 2 * NR * panels + 2 * KEYS + padded);
  }

  void place(Memory memory) {
    keys = memory.take(rows * width), values = memory.take(rows * width), panelled = memory.take(rows * NR * panels);
    dk = memory.take(rows * padded), dv = memory.take(rows * padded);
    q = memory.take(QUERIES * width), dout = memory.take(QUERIES * width);
    q_panels = memory.take(QUERIES * NR * panels), dout_panels = memory.take(QUERIES * NR * panels);
    weights = memory.take(QUERIES * KEYS), slopes = memory.take(QUERIES * KEYS), dq = memory.take(QUERIES * padded);
  }

  // `rows` rows of x, as panels (size, NR) side by side.
  void columns(const float* x, long step, long rows, float* to, long size) const {
    for (long p = 0; p < panels; p++)
      pack_columns(x + p * NR, step, std::min<long>(NR, width - p * NR), rows, to + p * size * NR);
  }

  void pack_keys() {
    float* gathered = scratch(1, 2 * NR * width);
    const float* k = a.k + image * a.keys * a.k_step + head * width;
    const float* v = a.v + image * a.keys * a.v_step + head * width;
    for (long start = 0; start < count; start += NR) {
      const long some = std::min<long>(NR, count - start);
      for (long i = 0; i < some; i++) {
        memcpy(gathered + i * width, k + of_key(start + i) * a.k_step, width * 4);
        memcpy(gathered + (NR + i) * width, v + of_key(start + i) * a.v_step, width * 4);
      }
      pack_rows(gathered, width, some, width, keys + start * width);
      pack_rows(gathered + NR * width, width, some, width, values + start * width);
      const long block = start / KEYS * KEYS, row = start - block;
      for (long p = 0; p < panels; p++)
        pack_columns(gathered + p * NR, width, std::min<long>(NR, width - p * NR), some,
                     panelled + block * NR * panels + p * KEYS * NR + row * NR);
    }
    std::fill(dk, dk + rows * padded, 0.0f);
    std::fill(dv, dv + rows * padded, 0.0f);
  }

  // Queries [first, first + some) against the block of keys from `start`.
  void block_of_keys(long start, long some, const float* logs, const float* products) {
    const long here = std::min(KEYS, count - start), filled = up(here, VL);
    for (long row = 0; row < up(some, MR); row += MR) {
      float *w = weights + row * KEYS, *s = slopes + row * KEYS;
      row_of_tiles<false, false>(q + row * width, width, keys + start * width, width * NR, width, w, KEYS, here);
      row_of_tiles<false, false>(dout + row * width, width, values + start * width, width * NR, width, s, KEYS, here);
      for (int i = 0; i < MR; i++) {
        float *of_row = w + i * KEYS, *slope = s + i * KEYS;
        const V log = spread(logs[row + i]), product = spread(products[row + i]);
        for (long j = here; j < filled; j++) of_row[j] = -INFINITY;
        for (long j = 0; j < filled; j += VL) {
          const V weight = exponential(load(of_row + j) * a.scale - log);
          store(of_row + j, weight);
          store(slope + j, weight * (load(slope + j) - product) * a.scale);
        }
        // Rows of the transposed products come in groups of MR.
        for (long j = filled; j < up(here, MR); j++) of_row[j] = slope[j] = 0;
      }
      row_of_tiles<true, false>(s, KEYS, panelled + start * NR * panels, KEYS * NR, here, dq + row * padded, padded,
                                width);
    }
    for (long key = 0; key < here; key += MR) {
      const long place = (start + key) * padded;
      row_of_tiles<true, true>(slopes + key, KEYS, q_panels, QUERIES * NR, some, dk + place, padded, width);
      row_of_tiles<true, true>(weights + key, KEYS, dout_panels, QUERIES * NR, some, dv + place, padded, width);
    }
  }

  void run() {
    pack_keys();
    float products[QUERIES], logs[QUERIES];
    for (long first = 0; first < a.queries; first += QUERIES) {
      const long some = std::min(QUERIES, a.queries - first), row = image * a.queries + first;
      const float* from = a.q + row * a.q_step + head * width;
      const float* out = a.out + row * a.out_step + head * width;
      const float* slope = g.dout + row * a.out_step + head * width;
      std::fill(q, q + 2 * QUERIES * width, 0.0f);  // and the gradient after it
      for (long i = 0; i < QUERIES; i++) {
        products[i] = logs[i] = 0;
        if (i >= some) continue;
        memcpy(q + i * width, from + i * a.q_step, width * 4);
        memcpy(dout + i * width, slope + i * a.out_step, width * 4);
        for (long j = 0; j < width; j++) products[i] += out[i * a.out_step + j] * slope[i * a.out_step + j];
        logs[i] = g.logs[(image * a.heads + head) * a.queries + first + i];
      }
      columns(q, width, some, q_panels, QUERIES);
      columns(dout, width, some, dout_panels, QUERIES);
      std::fill(dq, dq + QUERIES * padded, 0.0f);
      for (long start = 0; start < count; start += KEYS) block_of_keys(start, some, logs, products);
      for (long i = 0; i < some; i++) memcpy(g.dq + (row + i) * a.q_step + head * width, dq + i * padded, width * 4);
    }
    if (!kept.empty())
      for (long i = 0; i < a.keys; i++) {
        memset(g.dk + (image * a.keys + i) * a.k_step + head * width, 0, width * 4);
        memset(g.dv + (image * a.keys + i) * a.v_step + head * width, 0, width * 4);
      }
    for (long i = 0; i < count; i++) {
      memcpy(g.dk + (image * a.keys + of_key(i)) * a.k_step + head * width, dk + i * padded, width * 4);
      memcpy(g.dv + (image * a.keys + of_key(i)) * a.v_step + head * width, dv + i * padded, width * 4);
    }
  }
};

}  // namespace

void attend_backward(const AttentionGradient& g) {
  const std::vector<std::vector<int>> kept = kept_keys(g.forward);
  const long floats = Head::floats(g.forward);
  parallel(g.forward.batch * g.forward.heads, [&](long pair) {
    const long image = pair / g.forward.heads;
    Head head{g, g.forward, image, pair % g.forward.heads, kept[image]};
    head.place({scratch(0, floats)});
    head.run();
  });
}

// Attention with the softmax computed as its sums go on (arXiv 2205.14135), on the register tiles of the products.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "tile.h"

namespace {

constexpr long KEYS = 8 * NR;   // of a block
constexpr long QUERIES = 64;    // of a task
constexpr long PACKED = 1 << 23;  // floats of keys and values that are packed together, about

constexpr float LOG2_E = 1.44269504088896341f;

// Scores of MR queries with the first `lanes` keys of a panel, to s (MR, KEYS), -inf after them; `bias`, if given, is
// added to those of the first `height`. most[i] grows to the largest of row i in every lane.
template <int N>
void score_panel(const Attention& a, const float* q, const float* panel, const float* bias, long height, long lanes,
                 float* s, V (&most)[MR]) {
  V acc[MR][N];
  multiply<N>(q, a.width, panel, a.width, acc);
  if (bias)
    for (int i = 0; i < height; i++)
      for (int j = 0; j < N; j++)
        acc[i][j] += get(bias + i * a.keys + j * VL, std::min<long>(VL, lanes - j * VL)) * LOG2_E;
  if (lanes < N * VL) {
    VI lane;
    for (int i = 0; i < VL; i++) lane[i] = i + (N - 1) * VL;
    for (int i = 0; i < MR; i++) acc[i][N - 1] = lane < int32_t(lanes) ? acc[i][N - 1] : spread(-INFINITY);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      store(s + i * KEYS + j * VL, acc[i][j]);
      most[i] = larger(acc[i][j], most[i]);
    }
}

// o (MR, padded) = o * decay + weights (MR, KEYS) times a panel of values.
template <int N>
void value_panel(const float* weights, const float* panel, long count, float* o, long padded, const float* decay) {
  V acc[MR][N];
  multiply<N>(weights, KEYS, panel, count, acc);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      float* place = o + i * padded + j * VL;
      store(place, load(place) * decay[i] + acc[i][j]);
    }
}

// Keys and values of one head, packed: blocks of KEYS keys, each of panels (width, NR) of keys and panels (KEYS, NR) of
// values.
struct Packed {
  const float* keys;
  const float* values;
};

long vectors(long columns) { return (columns + VL - 1) / VL; }

void pack(const Attention& a, long image, long head, const std::vector<int>& kept, float* keys, float* values) {
  const long count = kept.empty() ? a.keys : kept.size();
  const float* k = a.k + image * a.keys * a.k_step + head * a.width;
  const float* v = a.v + image * a.keys * a.v_step + head * a.width;
  const long value_panels = (a.width + NR - 1) / NR;
  float* gathered = kept.empty() ? nullptr : scratch(1, NR * a.width);
  for (long start = 0; start < count; start += NR) {
    const long rows = std::min<long>(NR, count - start);
    const float* from = k + start * a.k_step;
    long step = a.k_step;
    if (gathered) {
      for (long i = 0; i < rows; i++) memcpy(gathered + i * a.width, k + kept[start + i] * a.k_step, a.width * 4);
      from = gathered;
      step = a.width;
    }
    pack_rows(from, step, rows, a.width, keys + start * a.width);
  }
  for (long i = 0; i < count; i++) {
    const float* from = v + (kept.empty() ? i : kept[i]) * a.v_step;
    float* block = values + i / KEYS * KEYS * NR * value_panels + i % KEYS * NR;
    for (long p = 0; p < value_panels; p++) {
      const long columns = std::min<long>(NR, a.width - p * NR);
      float* to = block + p * KEYS * NR;
      long j = 0;
      for (; j + VL <= columns; j += VL) store(to + j, load(from + p * NR + j));
      if (j < columns) store(to + j, load_part(from + p * NR + j, columns - j));
    }
  }
}

void scaled(const float* x, long count, float factor, float* y) {
  for (long i = 0; i < count; i += VL) {
    const long n = std::min<long>(VL, count - i);
    put(y + i, get(x + i, n) * factor, n);
  }
}

// MR queries of a head, and what is known of their answer: sums of weights and of weighted values, with the powers of
// two taken from the largest score so far.
struct Tile {
  float *q, *o;  // (MR, width), scaled; (MR, padded)
  float top[MR], total[MR];
};

// The part of `count` packed keys and values in the answer to a tile.
void take_in(const Attention& a, Tile& t, const float* keys, const float* values, long count, const float* bias,
             long height, float* s) {
  const long padded = vectors(a.width) * VL, filled = vectors(count) * VL;
  V most[MR];
  for (int i = 0; i < MR; i++) most[i] = spread(-INFINITY);
  for (long p = 0; p < count; p += NR) {
    const float *panel = keys + p * a.width, *of_panel = bias ? bias + p : nullptr;
    const long lanes = std::min<long>(NR, count - p);
    if (lanes > 2 * VL)
      score_panel<3>(a, t.q, panel, of_panel, height, lanes, s + p, most);
    else if (lanes > VL)
      score_panel<2>(a, t.q, panel, of_panel, height, lanes, s + p, most);
    else
      score_panel<1>(a, t.q, panel, of_panel, height, lanes, s + p, most);
  }
  float decay[MR];
  for (int i = 0; i < MR; i++) {
    const float highest = std::max(t.top[i], largest_of(most[i]));
    const V base = spread(highest);
    V sum = {};
    for (float* score = s + i * KEYS; score < s + i * KEYS + filled; score += VL) {
      const V weight = power_of_two(load(score) - base);
      store(score, weight);
      sum += weight;
    }
    decay[i] = power_of_two(spread(t.top[i] - highest))[0];
    t.total[i] = t.total[i] * decay[i] + sum_of(sum);
    t.top[i] = highest;
  }
  for (long column = 0; column < a.width; column += NR) {
    const float* panel = values + column * KEYS;
    const long left = a.width - column;
    if (left > 2 * VL)
      value_panel<3>(s, panel, count, t.o + column, padded, decay);
    else if (left > VL)
      value_panel<2>(s, panel, count, t.o + column, padded, decay);
    else
      value_panel<1>(s, panel, count, t.o + column, padded, decay);
  }
}

// Rows [begin, end) of the queries, at most QUERIES.
void answer(const Attention& a, long image, long head, const Packed& packed, long count, long begin, long end) {
  const long padded = vectors(a.width) * VL, panels = (a.width + NR - 1) / NR;
  float* s = scratch(2, MR * KEYS + QUERIES * (padded + a.width));
  Tile tiles[QUERIES / MR];
  for (long row = begin; row < end; row += MR) {
    Tile& t = tiles[(row - begin) / MR];
    t.o = s + MR * KEYS + (row - begin) * (padded + a.width);
    t.q = t.o + MR * padded;
    std::fill(t.o, t.o + MR * padded, 0.0f);
    const float* q = a.q + (image * a.queries + row) * a.q_step + head * a.width;
    for (int i = 0; i < MR; i++) {
      t.top[i] = -INFINITY, t.total[i] = 0;
      scaled(q + i * a.q_step, row + i < end ? a.width : 0, a.scale * LOG2_E, t.q + i * a.width);
      if (row + i >= end) std::fill(t.q + i * a.width, t.q + (i + 1) * a.width, 0.0f);
    }
  }
  for (long start = 0; start < count; start += KEYS) {
    const float *keys = packed.keys + start * a.width, *values = packed.values + start * NR * panels;
    for (long row = begin; row < end; row += MR) {
      const float* bias = nullptr;
      if (a.bias) bias = a.bias + image * a.bias_batch + (head * a.queries + row) * a.keys + start;
      take_in(a, tiles[(row - begin) / MR], keys, values, std::min(KEYS, count - start), bias,
              std::min<long>(MR, end - row), s);
    }
  }
  for (long row = begin; row < end; row++) {
    const Tile& t = tiles[(row - begin) / MR];
    const long i = (row - begin) % MR;
    float* to = a.out + (image * a.queries + row) * a.out_step + head * a.width;
    if (a.logs) a.logs[(image * a.heads + head) * a.queries + row] = t.top[i] / LOG2_E + std::log(t.total[i]);
    scaled(t.o + i * padded, a.width, 1.0f / t.total[i], to);
  }
}

}  // namespace

std::vector<std::vector<int>> kept_keys(const Attention& a) {
  std::vector<std::vector<int>> kept(a.batch);
  if (a.kept)
    for (long image = 0; image < a.batch; image++) {
      for (long i = 0; i < a.keys; i++)
        if (a.kept[(image * a.keys + i) * a.kept_step] >= 0) kept[image].push_back(i);
      if (long(kept[image].size()) == a.keys) kept[image].clear();
    }
  return kept;
}

void attend(const Attention& a) {
  const std::vector<std::vector<int>> kept = kept_keys(a);
  const long blocks = (a.keys + KEYS - 1) / KEYS, value_panels = (a.width + NR - 1) / NR;
  const long of_keys = blocks * KEYS * a.width, of_values = blocks * KEYS * NR * value_panels;
  const long pairs = a.batch * a.heads;
  if (pairs % thread_count() == 0 || pairs >= 8 * thread_count()) {  // a task a head: what it packed is still near
    parallel(pairs, [&](long pair) {
      const long image = pair / a.heads, head = pair % a.heads;
      float* keys = scratch(0, of_keys + of_values);
      pack(a, image, head, kept[image], keys, keys + of_keys);
      const long count = kept[image].empty() ? a.keys : kept[image].size();
      for (long row = 0; row < a.queries; row += QUERIES)
        answer(a, image, head, {keys, keys + of_keys}, count, row, std::min(a.queries, row + QUERIES));
    });
    return;
  }
  const long together = std::clamp<long>(PACKED / (of_keys + of_values), std::min<long>(pairs, thread_count()), pairs);
  float* packed = scratch(0, together * (of_keys + of_values));
  const long pieces = (a.queries + QUERIES - 1) / QUERIES;
  for (long first = 0; first < pairs; first += together) {
    const long some = std::min(together, pairs - first);
    parallel(some, [&](long task) {
      float* keys = packed + task * (of_keys + of_values);
      pack(a, (first + task) / a.heads, (first + task) % a.heads, kept[(first + task) / a.heads], keys, keys + of_keys);
    });
    parallel(some * pieces, [&](long task) {
      const long pair = task / pieces, image = (first + pair) / a.heads, head = (first + pair) % a.heads;
      const float* keys = packed + pair * (of_keys + of_values);
      const long count = kept[image].empty() ? a.keys : kept[image].size();
      const long begin = task % pieces * QUERIES;
      answer(a, image, head, {keys, keys + of_keys}, count, begin, std::min(a.queries, begin + QUERIES));
    });
  }
}

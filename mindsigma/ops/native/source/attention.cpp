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

// Products with keys [0, count) of a packed block, into s (MR, KEYS).
template <int N>
void score_panel(const float* q, long stride, const float* panel, long width, float* s) {
  V acc[MR][N];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) acc[i][j] = V{};
  multiply<N>(q, stride, panel, width, acc);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) store(s + i * KEYS + j * VL, acc[i][j]);
}

// o (MR, padded) = o * decay + weights (MR, KEYS) times a panel of values.
template <int N>
void value_panel(const float* weights, const float* panel, long count, float* o, long padded, const float* decay) {
  V acc[MR][N];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) acc[i][j] = V{};
  multiply<N>(weights, KEYS, panel, count, acc);
  for (int i = 0; i < MR; i++)
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

// Rows [row, row + height) of the queries, height <= MR.
void answer(const Attention& a, long image, long head, const Packed& packed, long count, long row, long height) {
  const long padded = vectors(a.width) * VL;
  float* s = scratch(2, MR * KEYS + MR * padded + MR * a.width);
  float* o = s + MR * KEYS;
  float* spare = o + MR * padded;
  std::fill(o, o + MR * padded, 0.0f);
  const float* q = a.q + (image * a.queries + row) * a.q_step + head * a.width;
  long stride = a.q_step;
  if (height < MR) {
    for (int i = 0; i < MR; i++) {
      if (i < height)
        memcpy(spare + i * a.width, q + i * a.q_step, a.width * 4);
      else
        memset(spare + i * a.width, 0, a.width * 4);
    }
    q = spare;
    stride = a.width;
  }
  const long value_panels = (a.width + NR - 1) / NR;
  float top[MR], total[MR], decay[MR];
  for (int i = 0; i < MR; i++) top[i] = -INFINITY, total[i] = 0;
  for (long start = 0; start < count; start += KEYS) {
    const long keys = std::min(KEYS, count - start), filled = vectors(keys) * VL;
    for (long p = 0; p < keys; p += NR) {
      const float* panel = packed.keys + (start + p) * a.width;
      const long n = vectors(std::min<long>(NR, keys - p));
      if (n == 3)
        score_panel<3>(q, stride, panel, a.width, s + p);
      else if (n == 2)
        score_panel<2>(q, stride, panel, a.width, s + p);
      else
        score_panel<1>(q, stride, panel, a.width, s + p);
    }
    for (int i = 0; i < MR; i++) {
      float* scores = s + i * KEYS;
      if (a.bias && i < height) {
        const float* bias =
            a.bias + image * a.bias_batch + (head * a.queries + row + i) * a.keys + start;
        for (long j = 0; j < keys; j++) scores[j] = scores[j] * a.scale + bias[j];
      }
      const float scale = a.bias && i < height ? 1.0f : a.scale;  // with a bias it has been done
      for (long j = keys; j < filled; j++) scores[j] = -INFINITY;
      V most = spread(-INFINITY);
      for (long j = 0; j < keys; j += VL) {
        V scaled = load(scores + j) * scale;
        store(scores + j, scaled);
        most = larger(scaled, most);
      }
      const float highest = std::max(top[i], largest_of(most));
      const V base = spread(highest);
      V sum = {};
      for (long j = 0; j < keys; j += VL) {
        V weight = exponential(load(scores + j) - base);
        store(scores + j, weight);
        sum += weight;
      }
      decay[i] = exponential(spread(top[i] - highest))[0];
      total[i] = total[i] * decay[i] + sum_of(sum);
      top[i] = highest;
    }
    const float* values = packed.values + start * NR * value_panels;
    for (long p = 0; p < value_panels; p++) {
      const float* panel = values + p * KEYS * NR;
      const long n = vectors(std::min<long>(NR, a.width - p * NR));
      if (n == 3)
        value_panel<3>(s, panel, keys, o + p * NR, padded, decay);
      else if (n == 2)
        value_panel<2>(s, panel, keys, o + p * NR, padded, decay);
      else
        value_panel<1>(s, panel, keys, o + p * NR, padded, decay);
    }
  }
  for (int i = 0; i < height; i++) {
    float* to = a.out + (image * a.queries + row + i) * a.out_step + head * a.width;
    const float inverse = 1.0f / total[i];
    if (a.logs) a.logs[(image * a.heads + head) * a.queries + row + i] = top[i] + std::log(total[i]);
    for (long j = 0; j < a.width; j++) to[j] = o[i * padded + j] * inverse;
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
      for (long row = 0; row < a.queries; row += MR)
        answer(a, image, head, {keys, keys + of_keys}, count, row, std::min<long>(MR, a.queries - row));
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
      const long begin = task % pieces * QUERIES, end = std::min(a.queries, begin + QUERIES);
      for (long row = begin; row < end; row += MR)
        answer(a, image, head, {keys, keys + of_keys}, count, row, std::min<long>(MR, end - row));
    });
  }
}

// The softmax is computed as its sums go on (arXiv 2205.14135); backward the weights are computed again from the
// logarithms of their sums (arXiv 2307.08691, section 3.1.2).
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.h"
#include "products.h"
#include "vector.h"

namespace {

constexpr long KEYS = 384, QUERIES = 256;  // of a block

// One head of one image: its keys and values, without those that are dropped.
struct Head {
  const Attention& a;
  long image, head, keys = a.keys;
  Matrix k, v;
  std::vector<int> kept;  // where they were, if some are dropped

  Head(const Attention& a, long pair) : a(a), image(pair / a.heads), head(pair % a.heads) {
    k = {a.k + image * a.keys * a.k_step + head * a.width, a.k_step};
    v = {a.v + image * a.keys * a.v_step + head * a.width, a.v_step};
    if (!a.kept) return;
    const float* of_image = a.kept + image * a.keys;
    const long dropped = std::count(of_image, of_image + a.keys, 0.0f);
    if (dropped == 0 || dropped == a.keys) return;  // none or all: an offset of all scores alike changes nothing
    for (long i = 0; i < a.keys; i++)
      if (of_image[i] != 0) kept.push_back(i);
    keys = kept.size();
    float* gathered = scratch(0, 2 * keys * a.width);
    for (long i = 0; i < keys; i++) {
      memcpy(gathered + i * a.width, k.data + kept[i] * k.step, a.width * 4);
      memcpy(gathered + (keys + i) * a.width, v.data + kept[i] * v.step, a.width * 4);
    }
    k = {gathered, a.width};
    v = {gathered + keys * a.width, a.width};
  }

  bool drops() const { return keys < a.keys; }
  long row(long query) const { return image * a.queries + query; }
  const float* q(long query) const { return a.q + row(query) * a.q_step + head * a.width; }
  float* out(long query) const { return a.out + row(query) * a.out_step + head * a.width; }
  float* log(long query) const { return a.logs + (image * a.heads + head) * a.queries + query; }

  // Products of `count` queries from `first` on with `some` keys from `start` on, times `scale`, rows KEYS apart.
  void scores(long first, long count, long start, long some, float scale, float* to) const {
    multiply(count, some, a.width, {q(first), a.q_step}, {k.data + start * k.step, k.step, true}, to, KEYS, scale);
  }

  void add_bias(long query, long start, long some, float* s) const {
    const float* bias = a.bias + image * a.bias_step + (head * a.queries + query) * a.keys;
    each_vector(some, [&](long i, long n) {
      V b = {};
      if (drops())
        for (long j = 0; j < n; j++) b[j] = bias[kept[start + i + j]];
      else
        b = get(bias + start + i, n);
      put(s + i, get(s + i, n) + b, n);
    });
  }

  // Answers to `count` queries from `first` on.
  void answer(long first, long count) const {
    float *s = scratch(1, QUERIES * KEYS), top[QUERIES], total[QUERIES];
    std::fill(top, top + count, -INFINITY);
    std::fill(total, total + count, 0.0f);
    for (long start = 0; start < keys; start += KEYS) {
      const long some = std::min(KEYS, keys - start);
      scores(first, count, start, some, a.scale, s);
      for (long i = 0; i < count; i++) {
        float* of_row = s + i * KEYS;
        if (a.bias) add_bias(first + i, start, some, of_row);
        V most = spread(-INFINITY), sum = {};
        each_vector(some, [&](long j, long n) {
          V v = get(of_row + j, n);
          for (long lane = n; lane < VL; lane++) v[lane] = -INFINITY;
          most = larger(v, most);
        });
        const float highest = std::max(top[i], fold(most, larger));
        each_vector(some, [&](long j, long n) {
          const V weight = exponential(get(of_row + j, n) - highest);
          put(of_row + j, weight, n);
          sum += masked(weight, n);
        });
        const float decay = exponential(spread(top[i] - highest))[0];
        total[i] = total[i] * decay + sum_of(sum);
        top[i] = highest;
        if (start > 0) scale_row(out(first + i), decay);
      }
      multiply(count, a.width, some, {s, KEYS}, {v.data + start * v.step, v.step}, out(first), a.out_step, 1,
               start > 0);
    }
    for (long i = 0; i < count; i++) {
      scale_row(out(first + i), 1 / total[i]);
      if (a.logs) *log(first + i) = top[i] + std::log(total[i]);
    }
  }

  void scale_row(float* row, float factor) const {
    each_vector(a.width, [&](long i, long n) { put(row + i, get(row + i, n) * factor, n); });
  }

  // Gradients of all; with dropped keys, those of keys and values by way of scratch.
  void backward(const AttentionGradient& g) const {
    float *dk = g.dk + image * a.keys * a.k_step + head * a.width,
          *dv = g.dv + image * a.keys * a.v_step + head * a.width;
    long dk_step = a.k_step, dv_step = a.v_step;
    float* weights = scratch(1, QUERIES * (2 * KEYS + a.width) + (drops() ? 2 * keys * a.width : 0));
    float *slopes = weights + QUERIES * KEYS, *dq = slopes + QUERIES * KEYS, *of_kept = dq + QUERIES * a.width;
    if (drops()) dk = of_kept, dv = of_kept + keys * a.width, dk_step = dv_step = a.width;
    for (long first = 0; first < a.queries; first += QUERIES) {
      const long count = std::min(QUERIES, a.queries - first);
      const Matrix queries{q(first), a.q_step}, dout{g.dout + (out(first) - a.out), a.out_step};
      for (long start = 0; start < keys; start += KEYS) {
        const long some = std::min(KEYS, keys - start);
        scores(first, count, start, some, a.scale, weights);
        multiply(count, some, a.width, dout, {v.data + start * v.step, v.step, true}, slopes, KEYS);
        for (long i = 0; i < count; i++) {
          const float *slope = dout.data + i * a.out_step, *result = out(first + i), log = *this->log(first + i);
          const float product = sum(a.width, [&](long j, long n) { return get(slope + j, n) * get(result + j, n); });
          float *w = weights + i * KEYS, *s = slopes + i * KEYS;
          each_vector(some, [&](long j, long n) {
            const V weight = exponential(get(w + j, n) - log);
            put(w + j, weight, n);
            put(s + j, weight * (get(s + j, n) - product) * a.scale, n);
          });
        }
        multiply(count, a.width, some, {slopes, KEYS}, {k.data + start * k.step, k.step}, dq, a.width, 1, start > 0);
        multiply(some, a.width, count, {slopes, KEYS, true}, queries, dk + start * dk_step, dk_step, 1, first > 0);
        multiply(some, a.width, count, {weights, KEYS, true}, dout, dv + start * dv_step, dv_step, 1, first > 0);
      }
      for (long i = 0; i < count; i++) memcpy(g.dq + (q(first + i) - a.q), dq + i * a.width, a.width * 4);
    }
    if (drops()) scatter(g, of_kept);
  }

  void scatter(const AttentionGradient& g, const float* of_kept) const {
    for (long i = 0, next = 0; i < a.keys; i++) {
      float* dk = g.dk + (image * a.keys + i) * a.k_step + head * a.width;
      float* dv = g.dv + (image * a.keys + i) * a.v_step + head * a.width;
      std::fill_n(dk, a.width, 0.0f), std::fill_n(dv, a.width, 0.0f);
      if (next == keys || kept[next] != i) continue;
      std::copy_n(of_kept + next * a.width, a.width, dk);
      std::copy_n(of_kept + (keys + next++) * a.width, a.width, dv);
    }
  }
};

}  // namespace

void attend(const Attention& a) {
  const long blocks = (a.queries + QUERIES - 1) / QUERIES;
  parallel(a.batch * a.heads * blocks, [&](long task) {
    const long first = task % blocks * QUERIES;
    Head(a, task / blocks).answer(first, std::min(QUERIES, a.queries - first));
  });
}

void attend_backward(const AttentionGradient& g) {
  parallel(g.forward.batch * g.forward.heads, [&](long pair) { Head(g.forward, pair).backward(g); });
}

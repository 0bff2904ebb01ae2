// A block of the DiT (models/dit/branches.py): its weights, its sizes, and the parts that sampling and training share.
#pragma once
#include <cmath>

#include "attention.h"
#include "linear.h"

template <class T>
struct Affine {
  T *weight, *bias;
};

// A block's maps and norms, in the order of its parameters. Norms of queries and keys, and the convolution with its
// norm that makes fewer keys and values, are not in every block; KV is not needed where the caption's keys are given.
enum Part { QKV, PROJ, Q_NORM, K_NORM, REDUCTION, KV_NORM, Q, KV, CROSS, FC1, FC2, PARTS };

template <class T>
using Parts = Affine<T>[PARTS];

// Rows of modulation.
enum Row { SHIFT, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE, ROWS };

struct BlockSizes {
  long batch, tokens, channels, heads, hidden;
  long keys;  // tokens of the caption
  long step;  // from one image's rows of modulation to the next one's, or 0
  float eps;

  long rows() const { return batch * tokens; }

  Linear map(const float* x, long in, Affine<const float> map, long out, float* y) const {
    Linear l{};
    l.x = x;
    l.rows = rows();
    l.in = in;
    l.weight = map.weight;
    l.bias = map.bias;
    l.out = out;
    l.y = y;
    l.rows_of_image = tokens;
    l.step = step;
    l.eps = eps;
    return l;
  }

  // Of tokens x (rows, channels) after their norm; `shift`: the row of modulation, its scale follows.
  Linear modulated(const float* x, const float* shift, Affine<const float> map, long out, float* y) const {
    Linear l = this->map(x, channels, map, out, y);
    l.shift = shift;
    l.scale = shift + channels;
    return l;
  }

  // x plus the map of `from`, with a gate or without.
  Linear added(const float* x, const float* from, long in, Affine<const float> map, const float* gate, float* y) const {
    Linear l = this->map(from, in, map, channels, y);
    l.gate = gate;
    l.residual = x;
    return l;
  }

  Attention attention(const float* q, long q_step, const float* k, long k_step, const float* v, long v_step, long keys,
                      float* out) const {
    Attention a{};
    a.q = q;
    a.q_step = q_step;
    a.k = k;
    a.k_step = k_step;
    a.v = v;
    a.v_step = v_step;
    a.keys = keys;
    a.queries = tokens;
    a.batch = batch;
    a.heads = heads;
    a.width = channels / heads;
    a.scale = 1.0f / std::sqrt(float(a.width));
    a.out = out;
    a.out_step = channels;
    return a;
  }
};

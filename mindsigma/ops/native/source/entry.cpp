// The functions that MindSpore calls, but for those of whole blocks.
#include <cmath>

#include "amx.h"
#include "arguments.h"
#include "attention_gradient.h"
#include "gradients.h"
#include "images.h"
#include "latents.h"
#include "linear.h"
#include "pool.h"

namespace {

// Of q, k and v, tensors from `first` on; the plan tells heads, scale, channels, where each begins, and of a mask.
Attention attention_of(const Arguments& a, int first) {
  const int32_t* plan = a.numbers(0);
  Attention t{};
  t.heads = plan[0];
  t.scale = as_float(plan[1]);
  const long channels = plan[2];
  t.width = channels / t.heads;
  t.q = a.floats(first) + plan[3];
  t.k = a.floats(first + 1) + plan[4];
  t.v = a.floats(first + 2) + plan[5];
  t.q_step = a.size(first, 2);
  t.k_step = a.size(first + 1, 2);
  t.v_step = a.size(first + 2, 2);
  t.batch = a.size(first, 0);
  t.queries = a.size(first, 1);
  t.keys = a.size(first + 1, 1);
  t.out_step = channels;
  if (plan[6]) {  // the column after a key's channels tells whether it is kept
    t.kept = t.k + channels;
    t.kept_step = t.k_step;
  }
  return t;
}

}  // namespace

extern "C" {

// Whether linear maps are computed by AMX.
int uses_amx() { return has_amx(); }

int linear(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 1, false, [&] {
    const int32_t* plan = a.numbers(0);
    const int32_t given = plan[0];
    Linear l{};
    l.x = a.floats(1);
    l.weight = a.floats(2);
    l.y = a.result();
    l.in = a.size(1, -1);
    l.out = a.size(2, 0);
    l.rows = a.elements(1) / l.in;
    l.rows_of_image = ranks[1] > 2 ? a.size(1, 1) : l.rows;
    l.eps = as_float(plan[1]);
    l.gelu = given & 64;
    if (given & 1) l.bias = a.floats(3);
    if (given & 2) {  // rows (batch, 6 or 2, C), which of them is the shift; the scale follows it
      l.step = a.size(4, 0) > 1 ? a.size(4, 1) * a.size(4, 2) : 0;
      l.shift = a.floats(4) + plan[2] * a.size(4, 2);
      l.scale = l.shift + a.size(4, 2);
    }
    if (given & 4) l.norm_weight = a.floats(5);
    if (given & 8) l.factor = a.floats(6);
    if (given & 16) {
      l.step = a.size(4, 0) > 1 ? a.size(4, 1) * a.size(4, 2) : 0;
      l.gate = a.floats(4) + plan[2] * a.size(4, 2);
    }
    if (given & 32) l.residual = a.floats(7);
    apply(l);
  });
}

int linear_gradient_of_input(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};  // dy, weight
  return guarded(a, 1, true, [&] {
    gradient_of_input(a.floats(0), a.floats(1), a.result(), a.size(0, 0), a.size(1, 1), a.size(0, 1));
  });
}

int linear_gradient_of_weight(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};  // dy, x
  return guarded(a, 1, true, [&] {
    gradient_of_weight(a.floats(0), a.floats(1), a.result(), a.size(0, 0), a.size(1, 1), a.size(0, 1));
  });
}

int linear_gradient_of_bias(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};  // dy
  return guarded(a, 1, true, [&] {
    gradient_of_bias(a.floats(0), a.result(), a.size(0, 0), a.size(0, 1));
  });
}

// eps, dy, x, rows, weight; dx, drows, dweight, dbias
int modulated_linear_gradient(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 4, true, [&] {
    const long in = a.size(4, 1), rows = a.elements(2) / in, images = a.size(3, 0);
    Workspace workspace(2 * rows * in);
    const Images of{images, rows / images, 2 * in};
    gradient_of_modulated({a.floats(1), a.floats(2), a.floats(3), a.floats(4), nullptr, a.floats_out(5),
                           a.floats_out(6), a.floats_out(7), a.floats_out(8), in, a.size(4, 0),
                           as_float(a.numbers(0)[0]), of},
                          workspace.floats);
  });
}

// plan as of attention without a bias, dout, q, k, v; dq, dk, dv
int attention_gradient(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 3, true, [&] {
    Attention t = attention_of(a, 2);
    Workspace workspace(t.batch * t.queries * (t.heads + t.out_step));
    t.logs = workspace.floats;
    t.out = workspace.floats + t.batch * t.queries * t.heads;
    attend(t);
    float *dq = a.floats_out(5), *dk = a.floats_out(6), *dv = a.floats_out(7);
    if (t.kept)  // its column has no gradient
      for (long key = 0; key < t.batch * t.keys; key++) dk[key * t.k_step + t.out_step] = 0;
    attend_backward({t, t.logs, a.floats(1), dq, dk, dv});
  });
}

int attention(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 1, false, [&] {
    Attention t = attention_of(a, 1);
    t.out = a.result();
    if (a.numbers(0)[7]) {
      t.bias = a.floats(4);
      t.bias_batch = a.size(4, 0) > 1 ? a.elements(4) / a.size(4, 0) : 0;
    }
    attend(t);
  });
}

int group_normalisation(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 1, false, [&] {
    const int32_t* plan = a.numbers(0);
    const long batch = a.size(1, 0), channels = a.size(1, 1);
    group_norm(a.floats(1), a.floats(2), a.floats(3), a.result(), batch, channels, a.elements(1) / (batch * channels),
               plan[0], as_float(plan[1]), plan[2]);
  });
}

int convolution(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 1, false, [&] {
    const int32_t* plan = a.numbers(0);
    Convolution c{};
    c.x = a.floats(1);
    c.weight = a.floats(2);
    c.bias = a.floats(3);
    c.residual = plan[1] ? a.floats(4) : nullptr;
    c.y = a.result();
    c.batch = a.size(1, 0);
    c.in = a.size(1, 1);
    c.out = a.size(2, 0);
    c.side = a.size(2, 2);
    c.enlarge = plan[0];
    c.height = a.size(1, 2) * (c.enlarge ? 2 : 1);
    c.width = a.size(1, 3) * (c.enlarge ? 2 : 1);
    convolve(c);
  });
}

// x; x twice
int twice(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 1, false, [&] {
    for (long half = 0; half < 2; half++) memcpy(a.result() + half * a.elements(0), a.floats(0), a.elements(0) * 4);
  });
}

// latents, position, weight (C, c, p, p), bias; tokens
int patch_embedding(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 1, false, [&] {
    const Patches p{a.size(0, 0), a.size(0, 1), a.size(0, 2), a.size(0, 3), a.size(2, 2)};
    embed(p, a.floats(0), a.floats(2), a.floats(3), a.floats(1), a.size(2, 0), a.result());
  });
}

// plan (row of the shift, eps), tokens, rows, latents, weight, bias; prediction
int patch_prediction(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 1, false, [&] {
    const int32_t* plan = a.numbers(0);
    const int y = count - 1;
    const long side = std::lround(std::sqrt(double(a.size(4, 0)) / a.size(y, 1)));
    const Patches p{a.size(y, 0), a.size(y, 1), a.size(y, 2), a.size(y, 3), side};
    Linear l{};
    l.x = a.floats(1);
    l.rows = p.batch * p.tokens();
    l.rows_of_image = p.tokens();
    l.in = a.size(1, 2);
    l.out = p.features();
    l.weight = a.floats(4);
    l.bias = a.floats(5);
    l.eps = as_float(plan[1]);
    l.step = a.size(2, 0) > 1 ? a.size(2, 1) * a.size(2, 2) : 0;
    l.shift = a.floats(2) + plan[0] * l.in;
    l.scale = l.shift + l.in;
    predict(p, l, a.result());
  });
}

// plan (whether guided), latents, history, numbers, guidance scale, prediction; latents and history
int solver_update(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 2, false, [&] {
    advance({a.floats(1), a.floats(2), a.floats(3), a.floats(5), a.numbers(0)[0] ? a.floats(4) : nullptr,
             a.floats_out(6), a.floats_out(7), a.size(1, 0), a.elements(1), a.size(2, 0),
             a.elements(5) / a.size(5, 0)});
  });
}
}

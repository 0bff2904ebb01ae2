// The functions that MindSpore calls: int f(count, tensors, ranks, shapes, dtypes, stream, extra), 0 if all went well.
// The tensors are those of mindsigma/ops/native/operations.py, which documents them, and the result.
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention_gradient.h"
#include "blocks.h"
#include "gradients.h"
#include "images.h"
#include "linear.h"
#include "pool.h"
#include "training_block.h"

namespace {

struct Arguments {
  int count;
  void** tensors;
  int* ranks;
  int64_t** shapes;

  long size(int i, int axis) const { return shapes[i][axis < 0 ? ranks[i] + axis : axis]; }
  long elements(int i) const {
    long product = 1;
    for (int axis = 0; axis < ranks[i]; axis++) product *= shapes[i][axis];
    return product;
  }
  const float* floats(int i) const { return static_cast<const float*>(tensors[i]); }
  const int32_t* numbers(int i) const { return static_cast<const int32_t*>(tensors[i]); }
  float* floats_out(int i) const { return static_cast<float*>(tensors[i]); }
  float* result() const { return floats_out(count - 1); }
};

float as_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

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

constexpr int WEIGHTS_BEGIN = 5, MAPS = 7;

TrainingBlock training_block_of(const Arguments& a, int first) {
  TrainingBlock b{};
  b.heads = a.size(0, 0);
  b.eps = as_float(a.numbers(0)[0]);
  b.batch = a.size(first, 0);
  b.tokens = a.size(first, 1);
  b.channels = a.size(first, 2);
  b.keys = a.size(first + 2, 1);
  int next = first;
  for (const float** place : {&b.x, &b.modulation, &b.caption, &b.kept, &b.table}) *place = a.floats(next++);
  b.hidden = a.size(first + WEIGHTS_BEGIN + 2 * (MAPS - 2), 0);
  for (auto* pair : {&b.qkv, &b.proj, &b.q, &b.kv, &b.cross, &b.fc1, &b.fc2})
    for (int i = 0; i < 2; i++) (*pair)[i] = a.floats(next++);
  return b;
}

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace

extern "C" {

int linear(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
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
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};  // dy, weight
    gradient_of_input(a.floats(0), a.floats(1), a.result(), a.size(0, 0), a.size(1, 1), a.size(0, 1));
  });
}

int linear_gradient_of_weight(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};  // dy, x
    gradient_of_weight(a.floats(0), a.floats(1), a.result(), a.size(0, 0), a.size(1, 1), a.size(0, 1));
  });
}

int linear_gradient_of_bias(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};  // dy
    gradient_of_bias(a.floats(0), a.result(), a.size(0, 0), a.size(0, 1));
  });
}

// eps, dy, x, rows, weight; dx, drows, dweight, dbias
int modulated_linear_gradient(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
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
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
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
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
    Attention t = attention_of(a, 1);
    t.out = a.result();
    if (a.numbers(0)[7]) {
      t.bias = a.floats(4);
      t.bias_batch = a.size(4, 0) > 1 ? a.elements(4) / a.size(4, 0) : 0;
    }
    attend(t);
  });
}

int blocks(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
    const int32_t* plan = a.numbers(0);
    Blocks b{};
    b.heads = plan[0];
    b.scale = as_float(plan[1]);
    b.eps = as_float(plan[2]);
    b.x = a.floats(1);
    b.rows = a.floats(2);
    b.y = a.result();
    b.batch = a.size(1, 0);
    b.tokens = a.size(1, 1);
    b.channels = a.size(1, 2);
    b.rows_step = a.size(2, 0) > 1 ? a.size(2, 1) * a.size(2, 2) : 0;
    b.keys = a.size(3, 1);
    b.masked = a.size(3, 2) > b.channels;
    constexpr int TENSORS = sizeof(Block) / sizeof(float*);
    std::vector<Block> all((count - 4) / TENSORS);
    memcpy(all.data(), tensors + 3, all.size() * sizeof(Block));
    b.hidden = a.size(3 + TENSORS - 4, 0);
    b.blocks = all.data();
    b.count = all.size();
    run(b);
  });
}

// plan, x, modulation, caption, kept, table, 14 weights; y and what is kept, unless there is just y
int training_block(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
    const TrainingBlock b = training_block_of(a, 1);
    const int results = 1 + WEIGHTS_BEGIN + 2 * MAPS;
    run_forward(b, a.floats_out(results), count > results + 1 ? a.floats_out(results + 1) : nullptr);
  });
}

// Floats that training_block keeps.
long floats_of_training_block(long heads, long batch, long tokens, long channels, long keys, long hidden) {
  TrainingBlock b{};
  b.heads = heads;
  b.batch = batch;
  b.tokens = tokens;
  b.channels = channels;
  b.keys = keys;
  b.hidden = hidden;
  return floats_to_keep(b);
}

// plan, dy, what was kept, then as of training_block; its gradients, but for the plan's and the mask's. With nothing
// kept the plan stands in its place.
int training_block_gradient(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
    const TrainingBlock b = training_block_of(a, 3);
    int next = 3 + WEIGHTS_BEGIN + 2 * MAPS;
    TrainingGradients g{};
    for (float** place : {&g.x, &g.modulation, &g.caption, &g.table}) *place = a.floats_out(next++);
    for (auto* pair : {&g.qkv, &g.proj, &g.q, &g.kv, &g.cross, &g.fc1, &g.fc2})
      for (int i = 0; i < 2; i++) (*pair)[i] = a.floats_out(next++);
    run_backward(b, a.floats(1), a.tensors[2] == a.tensors[0] ? nullptr : a.floats(2), g);
  });
}

int group_normalisation(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
    const int32_t* plan = a.numbers(0);
    const long batch = a.size(1, 0), channels = a.size(1, 1);
    group_norm(a.floats(1), a.floats(2), a.floats(3), a.result(), batch, channels, a.elements(1) / (batch * channels),
               plan[0], as_float(plan[1]), plan[2]);
  });
}

int convolution(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  return guarded([&] {
    Arguments a{count, tensors, ranks, shapes};
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
    c.enlarge = plan[0];
    c.height = a.size(1, 2) * (c.enlarge ? 2 : 1);
    c.width = a.size(1, 3) * (c.enlarge ? 2 : 1);
    convolve(c);
  });
}
}

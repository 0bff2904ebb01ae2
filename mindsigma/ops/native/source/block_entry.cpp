// The functions of whole blocks that MindSpore calls, and direct.py.
#include <vector>

#include "arguments.h"
#include "blocks.h"
#include "training_block.h"

namespace {

// Numbers of a plan (operations.py, block_plan), after them whether each block has fewer keys and values.
enum { HEADS, EPS, QK_NORM, REDUCTION_KIND, HEIGHT, WIDTH, DOWN, ACROSS, TEXT, REDUCED };
enum { KEEP = 1, TAKE };  // what to do with the changes by cross-attention

BlockSizes sizes_of(const Arguments& a, int x) {
  BlockSizes s{};
  s.heads = a.numbers(0)[HEADS];
  s.eps = as_float(a.numbers(0)[EPS]);
  s.batch = a.size(x, 0);
  s.tokens = a.size(x, 1);
  s.channels = a.size(x, 2);
  return s;
}

DivisionPlan division_of(const int32_t* plan, long block) {
  DivisionPlan division;
  division.qk_norm = plan[QK_NORM];
  if (plan[REDUCED + block]) {
    division.reduction = Reduction(plan[REDUCTION_KIND]);
    division.height = plan[HEIGHT];
    division.width = plan[WIDTH];
    division.down = plan[DOWN];
    division.across = plan[ACROSS];
  }
  return division;
}

// Call f(part, tensor of its weight, tensor of its bias) for the parts that a block has, tensors from `next` on.
// Returns the tensor after them.
template <class F>
int each_part(const DivisionPlan& division, bool has_kv, int next, F f) {
  for (int part = 0; part < PARTS; part++) {
    if ((part == Q_NORM || part == K_NORM) && !division.qk_norm) continue;
    if ((part == REDUCTION || part == KV_NORM) && division.reduction != Reduction::CONVOLUTION) continue;
    if (part == KV && !has_kv) continue;
    f(part, next, next + 1);
    next += 2;
  }
  return next;
}

// The parts of a block, tensors from `next` on, and its hidden width. Returns the tensor after them.
int read_parts(const Arguments& a, const DivisionPlan& division, bool has_kv, int next, Parts<const float>& parts,
               BlockSizes& sizes) {
  return each_part(division, has_kv, next, [&](int part, int weight, int bias) {
    parts[part] = {a.floats(weight), a.floats(bias)};
    if (part == FC1) sizes.hidden = a.size(weight, 0);
  });
}

TrainingBlock training_block_of(const Arguments& a, int first, int* after) {
  TrainingBlock b{};
  b.sizes = sizes_of(a, first);
  b.sizes.keys = a.size(first + 2, 1);
  b.division = division_of(a.numbers(0), 0);
  int next = first;
  for (const float** place : {&b.x, &b.modulation, &b.caption, &b.kept, &b.table}) *place = a.floats(next++);
  *after = read_parts(a, b.division, true, next, b.parts, b.sizes);
  return b;
}

}  // namespace

extern "C" {

// plan, x, rows, and of each block the caption's keys and values, its change by the caption if that is to be taken, and
// 12 or more weights; y, and the changes of all blocks if these are to be kept
int blocks(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  const bool keeps = a.elements(0) > TEXT && a.numbers(0)[TEXT] == KEEP;
  return guarded(a, keeps ? 2 : 1, false, [&] {
    const int32_t* plan = a.numbers(0);
    Blocks b{};
    b.sizes = sizes_of(a, 1);
    b.x = a.floats(1);
    b.rows = a.floats(2);
    b.sizes.step = a.size(2, 0) > 1 ? a.size(2, 1) * a.size(2, 2) : 0;
    b.sizes.keys = a.size(3, 1);
    b.masked = a.size(3, 2) > b.sizes.channels;
    std::vector<Block> all(a.size(0, 0) - REDUCED);
    int next = 3;
    for (size_t i = 0; i < all.size(); i++) {
      Block& block = all[i];
      block = {a.floats(next), a.floats(next + 1), nullptr, nullptr, {}, division_of(plan, i)};
      next += 2;
      if (plan[TEXT] == TAKE) block.change = a.floats(next++);
      next = read_parts(a, block.division, false, next, block.parts, b.sizes);
    }
    b.y = a.floats_out(next++);
    if (plan[TEXT] == KEEP)
      for (size_t i = 0; i < all.size(); i++)
        all[i].kept_change = a.floats_out(next) + i * b.sizes.rows() * b.sizes.channels;
    b.blocks = all.data();
    b.count = all.size();
    run(b);
  });
}

// plan, x, modulation, caption, kept, table, 14 or more weights; y and what is kept, unless there is just y
int training_block(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  const bool alone = count % 2;  // weights come in pairs
  return guarded(a, alone ? 1 : 2, false, [&] {
    int results;
    const TrainingBlock b = training_block_of(a, 1, &results);
    run_forward(b, a.floats_out(results), alone ? nullptr : a.floats_out(results + 1));
  });
}

// Floats that training_block keeps.
long floats_of_training_block(long heads, long batch, long tokens, long channels, long keys, long hidden) {
  return floats_to_keep({batch, tokens, channels, heads, hidden, keys, 0, 0});
}

// plan, dy, what was kept, then as of training_block; its gradients, but for the plan's and the mask's. With nothing
// kept the plan stands in its place.
int training_block_gradient(int count, void** tensors, int* ranks, int64_t** shapes, const char**, void*, void*) {
  const Arguments a{count, tensors, ranks, shapes};
  return guarded(a, 4 + (count - 12) / 2, true, [&] {
    int next;
    const TrainingBlock b = training_block_of(a, 3, &next);
    TrainingGradients g{};
    for (float** place : {&g.x, &g.modulation, &g.caption, &g.table}) *place = a.floats_out(next++);
    each_part(b.division, true, next, [&](int part, int weight, int bias) {
      g.parts[part] = {a.floats_out(weight), a.floats_out(bias)};
    });
    run_backward(b, a.floats(1), a.tensors[2] == a.tensors[0] ? nullptr : a.floats(2), g);
  });
}
}

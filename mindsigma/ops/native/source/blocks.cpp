// A block is six linear maps and two attentions; norms, gates and sums ride in the passes of the linear maps.
#include "blocks.h"

#include <algorithm>
#include <memory>

#include "attention.h"
#include "linear.h"

namespace {

enum { SHIFT = 0, GATE = 2, MLP_SHIFT = 3, MLP_GATE = 5, ROWS = 6 };

struct Runner {
  const Blocks& b;
  long tokens = b.batch * b.tokens;
  std::unique_ptr<float[]> wide{new float[tokens * std::max(3 * b.channels, b.hidden)]};
  std::unique_ptr<float[]> narrow{new float[tokens * b.channels]};
  std::unique_ptr<float[]> spare{new float[tokens * b.channels]};

  Linear map(const float* x, long in, const float* weight, const float* bias, long out, float* y) const {
    Linear l{};
    l.x = x;
    l.in = in;
    l.weight = weight;
    l.bias = bias;
    l.out = out;
    l.y = y;
    l.rows = tokens;
    l.rows_of_image = b.tokens;
    l.step = b.rows_step;
    l.eps = b.eps;
    return l;
  }

  void modulated(const float* x, const float* rows, const float* weight, const float* bias, long out, bool gelu) const {
    Linear l = map(x, b.channels, weight, bias, out, wide.get());
    l.shift = rows;
    l.scale = rows + b.channels;
    l.gelu = gelu;
    apply(l);
  }

  void add(const float* x, const float* from, long in, const float* weight, const float* bias, const float* gate,
           float* y) const {
    Linear l = map(from, in, weight, bias, b.channels, y);
    l.residual = x;
    l.gate = gate;
    apply(l);
  }

  Attention attention(const float* q, long q_step, const float* k, long k_step, const float* v, long v_step,
                      long keys) const {
    Attention t{};
    t.q = q;
    t.q_step = q_step;
    t.k = k;
    t.k_step = k_step;
    t.v = v;
    t.v_step = v_step;
    t.keys = keys;
    t.queries = b.tokens;
    t.batch = b.batch;
    t.heads = b.heads;
    t.width = b.channels / b.heads;
    t.scale = b.scale;
    t.out = narrow.get();
    t.out_step = b.channels;
    return t;
  }

  // x to y by way of `between`; x may be y.
  void one(const Block& block, const float* rows, const float* x, float* between, float* y) const {
    const long c = b.channels;
    modulated(x, rows + SHIFT * c, block.qkv, block.qkv_bias, 3 * c, false);
    attend(attention(wide.get(), 3 * c, wide.get() + c, 3 * c, wide.get() + 2 * c, 3 * c, b.tokens));
    add(x, narrow.get(), c, block.proj, block.proj_bias, rows + GATE * c, between);

    apply(map(between, c, block.q, block.q_bias, c, wide.get()));
    const long k_step = c + (b.masked ? 1 : 0);
    Attention cross = attention(wide.get(), c, block.k, k_step, block.v, c, b.keys);
    if (b.masked) {
      cross.kept = block.k + c;
      cross.kept_step = k_step;
    }
    attend(cross);
    add(between, narrow.get(), c, block.cross, block.cross_bias, nullptr, y);

    modulated(y, rows + MLP_SHIFT * c, block.fc1, block.fc1_bias, b.hidden, true);
    add(y, wide.get(), b.hidden, block.fc2, block.fc2_bias, rows + MLP_GATE * c, between);
    std::copy(between, between + tokens * c, y);
  }
};

}  // namespace

void run(const Blocks& b) {
  const Runner runner{b};
  const float* x = b.x;
  for (long i = 0; i < b.count; i++) {
    runner.one(b.blocks[i], b.rows + i * ROWS * b.channels, x, runner.spare.get(), b.y);
    x = b.y;
  }
}

// What a block keeps is what its products gave; norms, GELU and the attention's weights are computed again.
#include "block.h"

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "linear.h"
#include "pool.h"

namespace {

enum Row { SHIFT, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE, ROWS };

// What the forward pass gives, in the order of its computation: `projected` and `fed` are before their gates, `h`
// before GELU.
struct Kept {
  float *qkv, *attended, *logs, *projected, *x1, *kv, *queries, *crossed, *cross_logs, *x2, *h, *fed, *end;

  Kept(const Block& b, float* memory) {
    const long rows = b.batch * b.tokens, c = b.channels;
    Memory m{memory};
    qkv = m.take(b.q ? 0 : rows * 3 * c), attended = m.take(rows * c), logs = m.take(rows * b.heads);
    projected = m.take(rows * c), x1 = m.take(rows * c);
    kv = m.take(b.batch * b.caption_keys * 2 * c), queries = m.take(rows * c);
    crossed = m.take(rows * c), cross_logs = m.take(rows * b.heads), x2 = m.take(rows * c);
    h = m.take(rows * b.hidden), fed = m.take(rows * c);
    end = m.next;
  }
};

struct Runner {
  const Block& b;
  Kept kept;
  long rows = b.batch * b.tokens, c = b.channels;
  Images images{b.batch, b.tokens, ROWS* b.channels};

  Runner(const Block& block, float* memory) : b(block), kept(block, memory) {}

  const float* row(Row which) const { return b.modulation + which * c; }

  Linear map(const float* x, long in, Part part, long out, float* y) const {
    Linear l{};
    l.x = x;
    l.rows = rows;
    l.in = l.x_step = in;
    l.weight = b.parts[part].weight;
    l.bias = b.parts[part].bias;
    l.out = out;
    l.y = y;
    l.rows_of_image = b.tokens;
    l.step = images.step;
    l.eps = b.eps;
    return l;
  }

  Linear modulated(const float* x, Row shift, Part part, long out, float* y) const {
    Linear l = map(x, c, part, out, y);
    l.shift = row(shift);
    l.scale = l.shift + c;
    return l;
  }

  // y = x plus the map of `from`, times a gate if there is one.
  void add(const float* x, const float* from, long in, Part part, const float* gate, float* before, float* y) const {
    Linear l = map(from, in, part, c, y);
    l.gate = gate;
    l.residual = x;
    l.kept = before;
    apply(l);
  }

  Attention attention(const float* q, long q_step, const float* k, const float* v, long step, long keys, float* out,
                      float* logs) const {
    Attention a{};
    a.q = q, a.k = k, a.v = v;
    a.q_step = q_step, a.k_step = a.v_step = step;
    a.keys = keys, a.queries = b.tokens, a.batch = b.batch, a.heads = b.heads;
    a.width = c / b.heads;
    a.scale = 1 / std::sqrt(float(a.width));
    a.out = out, a.out_step = c, a.logs = logs;
    return a;
  }

  Attention self_attention() const {
    if (b.q) return attention(b.q, c, b.k, b.v, c, b.self_keys, kept.attended, kept.logs);
    return attention(kept.qkv, 3 * c, kept.qkv + c, kept.qkv + 2 * c, 3 * c, b.tokens, kept.attended, kept.logs);
  }

  Attention cross_attention() const {
    Attention a =
        attention(kept.queries, c, kept.kv, kept.kv + c, 2 * c, b.caption_keys, kept.crossed, kept.cross_logs);
    a.kept = b.mask;
    return a;
  }

  void forward(float* y, float* activated) const {
    if (!b.q) apply(modulated(b.x, SHIFT, QKV, 3 * c, kept.qkv));
    attend(self_attention());
    add(b.x, kept.attended, c, PROJ, row(GATE), kept.projected, kept.x1);

    apply(map(kept.x1, c, Q, c, kept.queries));
    Linear l = map(b.caption, c, KV, 2 * c, kept.kv);
    l.rows = b.batch * b.caption_keys;
    apply(l);
    attend(cross_attention());
    add(kept.x1, kept.crossed, c, CROSS, nullptr, nullptr, kept.x2);

    Linear mlp = modulated(kept.x2, MLP_SHIFT, FC1, b.hidden, activated);
    mlp.kept = kept.h;
    mlp.gelu = 1;
    apply(mlp);
    add(kept.x2, activated, b.hidden, FC2, row(MLP_GATE), kept.fed, y);
  }

  // dx, plus `added` if given, from dy (rows, c), through a linear map of `in` floats.
  Linear to_input_of(Part part, const float* dy, float* dx, long in, const float* added = nullptr) const {
    Linear l = to_input(dy, b.parts[part].weight, dx, rows, in, c);
    l.residual = added;
    return l;
  }

  // dx, plus `added`, from dy, through the linear map of a modulated norm of x.
  void through_modulated(const float* dy, const float* x, Row shift, Part part, long out, const BlockGradients& g,
                         const float* added, float* dx, float* spare) const {
    gradient_of_modulated({dy, x, row(shift), b.parts[part].weight, added, dx, g.modulation + shift * c, g.parts[part],
                           c, out, b.eps, images},
                          spare);
  }

  static long floats_of_backward(const Block& b) {
    return b.batch * (b.tokens * (8 * b.channels + 2 * b.hidden) + b.caption_keys * 2 * b.channels);
  }

  void backward(const float* dy, const BlockGradients& g, Memory memory) const {
    float *du = memory.take(rows * c), *dx2 = memory.take(rows * c), *dx1 = b.q ? g.x : memory.take(rows * c);
    float *spare = memory.take(2 * rows * c), *between = spare;
    float *activated = memory.take(rows * b.hidden), *dh = memory.take(rows * b.hidden);
    float *dqkv = b.q ? nullptr : memory.take(rows * 3 * c), *dkv = memory.take(b.batch * b.caption_keys * 2 * c);
    const long keys = b.batch * b.caption_keys;

    gradient_of_gate(dy, kept.fed, row(MLP_GATE), du, g.modulation + MLP_GATE * c, images, c);
    Linear to_h = to_input_of(FC2, du, dh, b.hidden);
    to_h.gelu_input = kept.h;
    to_h.gelu_output = activated;
    apply(to_h);
    gradient_of_weight(du, activated, g.parts[FC2], rows, b.hidden, c);
    through_modulated(dh, kept.x2, MLP_SHIFT, FC1, b.hidden, g, dy, dx2, spare);

    gradient_of_weight(dx2, kept.crossed, g.parts[CROSS], rows, c, c);
    apply(to_input_of(CROSS, dx2, between, c));
    attend_backward({cross_attention(), between, du, dkv, dkv + c});
    gradient_of_weight(du, kept.x1, g.parts[Q], rows, c, c);
    apply(to_input_of(Q, du, dx1, c, dx2));
    gradient_of_weight(dkv, b.caption, g.parts[KV], keys, c, 2 * c);
    apply(to_input(dkv, b.parts[KV].weight, g.caption, keys, c, 2 * c));

    gradient_of_gate(dx1, kept.projected, row(GATE), du, g.modulation + GATE * c, images, c);
    gradient_of_weight(du, kept.attended, g.parts[PROJ], rows, c, c);
    apply(to_input_of(PROJ, du, between, c));
    if (b.q) {
      attend_backward({self_attention(), between, g.q, g.k, g.v});
      for (long image = 0; image < b.batch; image++)  // of what this block has not used
        std::fill_n(g.modulation + image * images.step, GATE * c, 0.0f);
    } else {
      attend_backward({self_attention(), between, dqkv, dqkv + c, dqkv + 2 * c});
      through_modulated(dqkv, b.x, SHIFT, QKV, 3 * c, g, dx1, g.x, spare);
    }
  }
};

}  // namespace

long floats_to_keep(const Block& b) {
  const Kept measured(b, nullptr);
  return measured.end - measured.qkv;
}

void run_forward(const Block& b, float* y, float* kept) {
  const long to_keep = kept ? 0 : floats_to_keep(b);
  Workspace workspace(b.batch * b.tokens * b.hidden + to_keep);
  Memory memory{workspace.floats};
  float* activated = memory.take(b.batch * b.tokens * b.hidden);
  Runner(b, kept ? kept : memory.next).forward(y, activated);
}

void run_backward(const Block& b, const float* dy, const float* kept, const BlockGradients& gradients) {
  const long to_keep = kept ? 0 : floats_to_keep(b);
  Workspace workspace(to_keep + Runner::floats_of_backward(b));
  Memory memory{workspace.floats};
  float* again = memory.take(to_keep);
  const Runner runner(b, kept ? const_cast<float*>(kept) : again);
  if (!kept) {
    Memory spare = memory;
    float* y = spare.take(b.batch * b.tokens * b.channels);  // is not needed
    runner.forward(y, spare.next);
  }
  runner.backward(dy, gradients, memory);
}

// What a block keeps is what its products gave; norms, GELU and the attention's weights are computed again.
#include "training_block.h"

#include <cmath>

#include "attention_gradient.h"
#include "gradients.h"
#include "linear.h"
#include "pool.h"

namespace {

enum { SHIFT = 0, SCALE, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE, ROWS };

// What the forward pass gives, in the order of its computation: `projected` and `fed` are before their gates, `h`
// before GELU.
struct Kept {
  float *qkv, *attended, *logs, *projected, *x1, *kv, *q, *crossed, *cross_logs, *x2, *h, *fed;

  Kept(const TrainingBlock& b, float* memory) {
    const long rows = b.batch * b.tokens, c = b.channels;
    Memory m{memory};
    qkv = m.take(rows * 3 * c), attended = m.take(rows * c), logs = m.take(rows * b.heads);
    projected = m.take(rows * c), x1 = m.take(rows * c);
    kv = m.take(b.batch * b.keys * 2 * c), q = m.take(rows * c);
    crossed = m.take(rows * c), cross_logs = m.take(rows * b.heads), x2 = m.take(rows * c);
    h = m.take(rows * b.hidden), fed = m.take(rows * c);
  }

  static long floats(const TrainingBlock& b) {
    const Kept measured(b, nullptr);
    return measured.fed - measured.qkv + b.batch * b.tokens * b.channels;
  }
};

struct Runner {
  const TrainingBlock& b;
  Kept kept;
  float* modulation;  // rows (batch, ROWS, channels): those of the table and the timestep, scales plus 1
  long rows = b.batch * b.tokens, c = b.channels;
  Images images{b.batch, b.tokens, ROWS * b.channels};

  Runner(const TrainingBlock& block, float* memory, float* modulation)
      : b(block), kept(block, memory), modulation(modulation) {
    for (long image = 0; image < b.batch; image++)
      for (long i = 0; i < ROWS * c; i++)
        modulation[image * ROWS * c + i] = b.table[i] + b.modulation[image * ROWS * c + i] +
                                           (i / c == SCALE || i / c == MLP_SCALE ? 1.0f : 0.0f);
  }

  Linear map(const float* x, long rows, long in, const float* const (&weight)[2], long out, float* y) const {
    Linear l{};
    l.x = x;
    l.rows = rows;
    l.in = in;
    l.weight = weight[0];
    l.bias = weight[1];
    l.out = out;
    l.y = y;
    l.rows_of_image = b.tokens;
    l.step = images.step;
    l.eps = b.eps;
    return l;
  }

  Linear modulated(const float* x, long shift, const float* const (&weight)[2], long out, float* y) const {
    Linear l = map(x, rows, c, weight, out, y);
    l.shift = modulation + shift * c;
    l.scale = l.shift + c;
    return l;
  }

  Attention attention(const float* q, long q_step, const float* k, const float* v, long k_step, long keys,
                      float* out) const {
    Attention a{};
    a.q = q;
    a.q_step = q_step;
    a.k = k;
    a.v = v;
    a.k_step = a.v_step = k_step;
    a.keys = keys;
    a.queries = b.tokens;
    a.batch = b.batch;
    a.heads = b.heads;
    a.width = c / b.heads;
    a.scale = 1.0f / std::sqrt(float(a.width));
    a.out = out;
    a.out_step = c;
    return a;
  }

  Attention self_attention() const {
    return attention(kept.qkv, 3 * c, kept.qkv + c, kept.qkv + 2 * c, 3 * c, b.tokens, kept.attended);
  }

  Attention cross_attention() const {
    Attention a = attention(kept.q, c, kept.kv, kept.kv + c, 2 * c, b.keys, kept.crossed);
    a.kept = b.kept;
    a.kept_step = 1;
    return a;
  }

  void forward(float* y, float* wide) const {
    apply(modulated(b.x, SHIFT, b.qkv, 3 * c, kept.qkv));
    Attention self = self_attention();
    self.logs = kept.logs;
    attend(self);
    add_gated(b.x, kept.attended, c, b.proj, GATE, kept.projected, kept.x1);

    apply(map(kept.x1, rows, c, b.q, c, kept.q));
    apply(map(b.caption, b.batch * b.keys, c, b.kv, 2 * c, kept.kv));
    Attention cross = cross_attention();
    cross.logs = kept.cross_logs;
    attend(cross);
    Linear sum = map(kept.crossed, rows, c, b.cross, c, kept.x2);
    sum.residual = kept.x1;
    apply(sum);

    Linear mlp = modulated(kept.x2, MLP_SHIFT, b.fc1, b.hidden, wide);
    mlp.kept = kept.h;
    mlp.gelu = true;
    apply(mlp);
    add_gated(kept.x2, wide, b.hidden, b.fc2, MLP_GATE, kept.fed, y);
  }

  void add_gated(const float* x, const float* from, long in, const float* const (&weight)[2], long gate, float* before,
                 float* y) const {
    Linear l = map(from, rows, in, weight, c, y);
    l.kept = before;
    l.gate = modulation + gate * c;
    l.residual = x;
    apply(l);
  }

  void of_weights(const float* dy, const float* x, long rows, long in, long out, float* const (&to)[2]) const {
    gradient_of_weight(dy, x, to[0], rows, in, out);
    gradient_of_bias(dy, to[1], rows, out);
  }

  // dx, plus `added`, from dy, through the linear map of a modulated norm of x.
  void through_modulated(const float* dy, const float* x, long shift, const float* weight, long out,
                         float* const (&of_weight)[2], const float* added, float* dx, float* drows,
                         float* spare) const {
    gradient_of_modulated({dy, x, modulation + shift * c, weight, added, dx, drows + shift * c, of_weight[0],
                           of_weight[1], c, out, b.eps, images},
                          spare);
  }

  void backward(const float* dy, const TrainingGradients& g, Memory memory) const {
    float *du = memory.take(rows * c), *dx2 = memory.take(rows * c), *dx1 = memory.take(rows * c);
    float *spare = memory.take(2 * rows * c), *between = spare;
    float *activated = memory.take(rows * b.hidden), *dh = memory.take(rows * b.hidden);
    float *dqkv = memory.take(rows * 3 * c), *dkv = memory.take(b.batch * b.keys * 2 * c);
    float* drows = g.modulation;

    gradient_of_gate(dy, kept.fed, modulation + MLP_GATE * c, du, drows + MLP_GATE * c, images, c);
    gradient_of_gelu_input(du, b.fc2[0], kept.h, dh, activated, rows, b.hidden, c);
    of_weights(du, activated, rows, b.hidden, c, g.fc2);
    through_modulated(dh, kept.x2, MLP_SHIFT, b.fc1[0], b.hidden, g.fc1, dy, dx2, drows, spare);

    of_weights(dx2, kept.crossed, rows, c, c, g.cross);
    gradient_of_input(dx2, b.cross[0], between, rows, c, c);
    attend_backward({cross_attention(), kept.cross_logs, between, du, dkv, dkv + c});
    of_weights(du, kept.x1, rows, c, c, g.q);
    gradient_of_input(du, b.q[0], dx1, rows, c, c, dx2);
    of_weights(dkv, b.caption, b.batch * b.keys, c, 2 * c, g.kv);
    gradient_of_input(dkv, b.kv[0], g.caption, b.batch * b.keys, c, 2 * c);

    gradient_of_gate(dx1, kept.projected, modulation + GATE * c, du, drows + GATE * c, images, c);
    of_weights(du, kept.attended, rows, c, c, g.proj);
    gradient_of_input(du, b.proj[0], between, rows, c, c);
    attend_backward({self_attention(), kept.logs, between, dqkv, dqkv + c, dqkv + 2 * c});
    through_modulated(dqkv, b.x, SHIFT, b.qkv[0], 3 * c, g.qkv, dx1, g.x, drows, spare);

    gradient_of_bias(drows, g.table, b.batch, ROWS * c);  // a sum over the images
  }
};

long floats_of_modulation(const TrainingBlock& b) { return b.batch * ROWS * b.channels; }

}  // namespace

long floats_to_keep(const TrainingBlock& b) { return Kept::floats(b); }

void run_forward(const TrainingBlock& b, float* y, float* kept) {
  const long rows = b.batch * b.tokens, to_keep = kept ? 0 : Kept::floats(b);
  Workspace workspace(floats_of_modulation(b) + rows * b.hidden + to_keep);
  Memory memory{workspace.floats};
  float *modulation = memory.take(floats_of_modulation(b)), *wide = memory.take(rows * b.hidden);
  Runner(b, kept ? kept : memory.next, modulation).forward(y, wide);
}

void run_backward(const TrainingBlock& b, const float* dy, const float* kept, const TrainingGradients& gradients) {
  const long rows = b.batch * b.tokens, to_keep = kept ? 0 : Kept::floats(b);
  const long spare = rows * (8 * b.channels + 2 * b.hidden) + b.batch * b.keys * 2 * b.channels;
  Workspace workspace(floats_of_modulation(b) + to_keep + spare);
  Memory memory{workspace.floats};
  float *modulation = memory.take(floats_of_modulation(b)), *again = memory.take(to_keep);
  const Runner runner(b, kept ? const_cast<float*>(kept) : again, modulation);
  if (!kept) runner.forward(memory.next, memory.next + rows * b.channels);  // the result is not needed
  runner.backward(dy, gradients, memory);
}

// What a block keeps is what its products gave; norms, GELU, the attention's weights, and fewer keys and values are
// computed again.
#include "training_block.h"

#include "attention_gradient.h"
#include "gradients.h"

namespace {

// What the forward pass gives, in the order of its computation: `projected` and `fed` are before their gates, `h`
// before GELU.
struct Kept {
  float *qkv, *attended, *logs, *projected, *x1, *kv, *q, *crossed, *cross_logs, *x2, *h, *fed;

  Kept(const BlockSizes& s, float* memory) {
    const long rows = s.rows(), c = s.channels;
    Memory m{memory};
    qkv = m.take(rows * 3 * c), attended = m.take(rows * c), logs = m.take(rows * s.heads);
    projected = m.take(rows * c), x1 = m.take(rows * c);
    kv = m.take(s.batch * s.keys * 2 * c), q = m.take(rows * c);
    crossed = m.take(rows * c), cross_logs = m.take(rows * s.heads), x2 = m.take(rows * c);
    h = m.take(rows * s.hidden), fed = m.take(rows * c);
  }

  static long floats(const BlockSizes& s) {
    const Kept measured(s, nullptr);
    return measured.fed - measured.qkv + s.rows() * s.channels;
  }
};

struct Runner {
  const TrainingBlock& b;
  BlockSizes s = b.sizes;
  Kept kept;
  float* modulation;  // rows (batch, ROWS, channels): those of the table and the timestep, scales plus 1
  long rows = s.rows(), c = s.channels;
  Images images{s.batch, s.tokens, ROWS * s.channels};

  Runner(const TrainingBlock& block, float* memory, float* modulation)
      : b(block), kept(block.sizes, memory), modulation(modulation) {
    s.step = images.step;
    for (long image = 0; image < s.batch; image++)
      for (long i = 0; i < ROWS * c; i++)
        modulation[image * ROWS * c + i] = b.table[i] + b.modulation[image * ROWS * c + i] +
                                           (i / c == SCALE || i / c == MLP_SCALE ? 1.0f : 0.0f);
  }

  const float* row(Row which) const { return modulation + which * c; }

  // Of the caption's tokens (batch * keys, channels).
  void keys_and_values() const {
    Linear l = s.map(b.caption, c, b.parts[KV], 2 * c, kept.kv);
    l.rows = s.batch * s.keys;
    apply(l);
  }

  Attention cross_attention() const {
    Attention a = s.attention(kept.q, c, kept.kv, 2 * c, kept.kv + c, 2 * c, s.keys, kept.crossed);
    a.kept = b.kept;
    a.kept_step = 1;
    return a;
  }

  void forward(float* y, float* wide, Memory memory) const {
    apply(s.modulated(b.x, row(SHIFT), b.parts[QKV], 3 * c, kept.qkv));
    const Division division(b.division, s, b.parts, kept.qkv, memory);
    division.run();
    Attention self = division.attention(kept.attended);
    self.logs = kept.logs;
    attend(self);
    add_gated(b.x, kept.attended, c, PROJ, GATE, kept.projected, kept.x1);

    apply(s.map(kept.x1, c, b.parts[Q], c, kept.q));
    keys_and_values();
    Attention cross = cross_attention();
    cross.logs = kept.cross_logs;
    attend(cross);
    apply(s.added(kept.x1, kept.crossed, c, b.parts[CROSS], nullptr, kept.x2));

    Linear mlp = s.modulated(kept.x2, row(MLP_SHIFT), b.parts[FC1], s.hidden, wide);
    mlp.kept = kept.h;
    mlp.gelu = true;
    apply(mlp);
    add_gated(kept.x2, wide, s.hidden, FC2, MLP_GATE, kept.fed, y);
  }

  void add_gated(const float* x, const float* from, long in, Part map, Row gate, float* before, float* y) const {
    Linear l = s.added(x, from, in, b.parts[map], row(gate), y);
    l.kept = before;
    apply(l);
  }

  void of_weights(const float* dy, const float* x, long rows, long in, long out, Affine<float> to) const {
    gradient_of_weight(dy, x, to.weight, rows, in, out);
    gradient_of_bias(dy, to.bias, rows, out);
  }

  // dx, plus `added`, from dy, through the linear map of a modulated norm of x.
  void through_modulated(const float* dy, const float* x, Row shift, Part map, long out, const TrainingGradients& g,
                         const float* added, float* dx, float* spare) const {
    gradient_of_modulated({dy, x, row(shift), b.parts[map].weight, added, dx, g.modulation + shift * c,
                           g.parts[map].weight, g.parts[map].bias, c, out, s.eps, images},
                          spare);
  }

  static long floats_of_backward(const BlockSizes& s, const DivisionPlan& plan) {
    return s.rows() * (8 * s.channels + 2 * s.hidden) + s.batch * s.keys * 2 * s.channels + Division::floats(plan, s) +
           Division::floats_of_gradient(plan, s);
  }

  void backward(const float* dy, const TrainingGradients& g, Memory memory) const {
    float *du = memory.take(rows * c), *dx2 = memory.take(rows * c), *dx1 = memory.take(rows * c);
    float *spare = memory.take(2 * rows * c), *between = spare;
    float *activated = memory.take(rows * s.hidden), *dh = memory.take(rows * s.hidden);
    float *dqkv = memory.take(rows * 3 * c), *dkv = memory.take(s.batch * s.keys * 2 * c);
    float* drows = g.modulation;
    const long keys = s.batch * s.keys;

    gradient_of_gate(dy, kept.fed, row(MLP_GATE), du, drows + MLP_GATE * c, images, c);
    gradient_of_gelu_input(du, b.parts[FC2].weight, kept.h, dh, activated, rows, s.hidden, c);
    of_weights(du, activated, rows, s.hidden, c, g.parts[FC2]);
    through_modulated(dh, kept.x2, MLP_SHIFT, FC1, s.hidden, g, dy, dx2, spare);

    of_weights(dx2, kept.crossed, rows, c, c, g.parts[CROSS]);
    gradient_of_input(dx2, b.parts[CROSS].weight, between, rows, c, c);
    attend_backward({cross_attention(), kept.cross_logs, between, du, dkv, dkv + c});
    of_weights(du, kept.x1, rows, c, c, g.parts[Q]);
    gradient_of_input(du, b.parts[Q].weight, dx1, rows, c, c, dx2);
    of_weights(dkv, b.caption, keys, c, 2 * c, g.parts[KV]);
    gradient_of_input(dkv, b.parts[KV].weight, g.caption, keys, c, 2 * c);

    gradient_of_gate(dx1, kept.projected, row(GATE), du, drows + GATE * c, images, c);
    of_weights(du, kept.attended, rows, c, c, g.parts[PROJ]);
    gradient_of_input(du, b.parts[PROJ].weight, between, rows, c, c);
    const Division division(b.division, s, b.parts, kept.qkv, memory);
    division.run();
    const Division::Gradients to = division.receive(dqkv, memory);
    attend_backward({division.attention(kept.attended), kept.logs, between, to.q, to.k, to.v});
    division.backward(to, dqkv, g.parts);
    through_modulated(dqkv, b.x, SHIFT, QKV, 3 * c, g, dx1, g.x, spare);

    gradient_of_bias(drows, g.table, s.batch, ROWS * c);  // a sum over the images
  }
};

long floats_of_modulation(const BlockSizes& s) { return s.batch * ROWS * s.channels; }

}  // namespace

long floats_to_keep(const BlockSizes& s) { return Kept::floats(s); }

void run_forward(const TrainingBlock& b, float* y, float* kept) {
  const BlockSizes& s = b.sizes;
  const long to_keep = kept ? 0 : Kept::floats(s), wide_floats = s.rows() * s.hidden;
  Workspace workspace(floats_of_modulation(s) + wide_floats + to_keep + Division::floats(b.division, s));
  Memory memory{workspace.floats};
  float *modulation = memory.take(floats_of_modulation(s)), *wide = memory.take(wide_floats);
  float* all = kept ? kept : memory.take(to_keep);
  Runner(b, all, modulation).forward(y, wide, memory);
}

void run_backward(const TrainingBlock& b, const float* dy, const float* kept, const TrainingGradients& gradients) {
  const BlockSizes& s = b.sizes;
  const long to_keep = kept ? 0 : Kept::floats(s);
  Workspace workspace(floats_of_modulation(s) + to_keep + Runner::floats_of_backward(s, b.division));
  Memory memory{workspace.floats};
  float *modulation = memory.take(floats_of_modulation(s)), *again = memory.take(to_keep);
  const Runner runner(b, kept ? const_cast<float*>(kept) : again, modulation);
  if (!kept) {
    Memory spare = memory;
    float *y = spare.take(s.rows() * s.channels), *wide = spare.take(s.rows() * s.hidden);  // y is not needed
    runner.forward(y, wide, spare);
  }
  runner.backward(dy, gradients, memory);
}

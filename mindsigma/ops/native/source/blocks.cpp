// A block is six linear maps and two attentions; norms, gates and sums ride in the passes of the linear maps.
#include "blocks.h"

#include <algorithm>
#include <memory>

namespace {

struct Runner {
  const Blocks& b;
  const BlockSizes& s = b.sizes;
  float *wide, *narrow, *spare;
  Memory divided;  // of the block at hand

  Runner(const Blocks& b, Memory memory) : b(b) {
    wide = memory.take(wide_floats(b.sizes));
    narrow = memory.take(s.rows() * s.channels);
    spare = memory.take(s.rows() * s.channels);
    divided = memory;
  }

  static long wide_floats(const BlockSizes& s) { return s.rows() * std::max(3 * s.channels, s.hidden); }

  static long floats(const Blocks& b) {
    long most = 0;
    for (long i = 0; i < b.count; i++) most = std::max(most, Division::floats(b.blocks[i].division, b.sizes));
    return wide_floats(b.sizes) + 2 * b.sizes.rows() * b.sizes.channels + most;
  }

  void attend_to_caption(const Block& block, const float* x, float* y) const {
    const long c = s.channels, k_step = c + (b.masked ? 1 : 0);
    apply(s.map(x, c, block.parts[Q], c, wide));
    Attention cross = s.attention(wide, c, block.k, k_step, block.v, c, s.keys, narrow);
    if (b.masked) {
      cross.kept = block.k + c;
      cross.kept_step = k_step;
    }
    attend(cross);
    Linear sum = s.added(x, narrow, c, block.parts[CROSS], nullptr, y);
    sum.kept = block.kept_change;
    apply(sum);
  }

  // x to y by way of `between`; x may be y.
  void one(const Block& block, const float* rows, const float* x, float* between, float* y) const {
    const long c = s.channels;
    const auto& parts = block.parts;
    apply(s.modulated(x, rows + SHIFT * c, parts[QKV], 3 * c, wide));
    Memory memory = divided;
    const Division division(block.division, s, parts, wide, memory);
    division.run();
    attend(division.attention(narrow));
    apply(s.added(x, narrow, c, parts[PROJ], rows + GATE * c, between));

    if (block.change)
      for (long i = 0; i < s.rows() * c; i++) y[i] = between[i] + block.change[i];
    else
      attend_to_caption(block, between, y);

    Linear mlp = s.modulated(y, rows + MLP_SHIFT * c, parts[FC1], s.hidden, wide);
    mlp.gelu = true;
    apply(mlp);
    apply(s.added(y, wide, s.hidden, parts[FC2], rows + MLP_GATE * c, between));
    std::copy(between, between + s.rows() * c, y);
  }
};

}  // namespace

void run(const Blocks& b) {
  const std::unique_ptr<float[]> memory(new float[Runner::floats(b)]);
  const Runner runner(b, {memory.get()});
  const float* x = b.x;
  for (long i = 0; i < b.count; i++) {
    runner.one(b.blocks[i], b.rows + i * ROWS * b.sizes.channels, x, runner.spare, b.y);
    x = b.y;
  }
}

// A block is six linear maps and two attentions; norms, gates and sums ride in the passes of the linear maps.
#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace {

struct Runner {
  const Blocks& b;
  const BlockSizes& s = b.sizes;
  float *wide, *narrow, *spare;
  Memory divided;            // of the block at hand
  std::vector<long> single;  // the caption's only token of each image, or -1

  Runner(const Blocks& b, Memory memory) : b(b) {
    wide = memory.take(wide_floats(b.sizes));
    narrow = memory.take(s.rows() * s.channels);
    spare = memory.take(s.rows() * s.channels);
    divided = memory;
    for (long image = 0; image < s.batch; image++) single.push_back(b.only_token(image));
  }

  static long wide_floats(const BlockSizes& s) { return s.rows() * std::max(3 * s.channels, s.hidden); }

  static long floats(const Blocks& b) {
    long most = 0;
    for (long i = 0; i < b.count; i++) most = std::max(most, Division::floats(b.blocks[i].division, b.sizes));
    return wide_floats(b.sizes) + 2 * b.sizes.rows() * b.sizes.channels + most;
  }

  // y = x plus what the caption adds. Who attends to a single token gets that token's value whatever it asks.
  void attend_to_caption(const Block& block, const float* x, float* y) const {
    for (long first = 0; first < s.batch;) {
      long next = first + 1;
      while (next < s.batch && (single[next] < 0) == (single[first] < 0)) next++;
      const long begin = first * s.tokens * s.channels, of_keys = first * s.keys;
      float* change = block.kept_change ? block.kept_change + begin : nullptr;
      if (single[first] < 0)
        attend_to_tokens(block, next - first, of_keys, x + begin, y + begin, change);
      else
        for (long image = first; image < next; image++) add_value_of(block, image, x, y, block.kept_change);
      first = next;
    }
  }

  // Of `images` whose keys begin with `of_keys`; x and y begin with the first of them.
  void attend_to_tokens(const Block& block, long images, long of_keys, const float* x, float* y, float* change) const {
    const long c = s.channels, k_step = c + (b.masked ? 1 : 0);
    BlockSizes some = s;
    some.batch = images;
    apply(some.map(x, c, block.parts[Q], c, wide));
    const float* k = block.k + of_keys * k_step;
    Attention cross = some.attention(wide, c, k, k_step, block.v + of_keys * c, c, s.keys, narrow);
    if (b.masked) {
      cross.kept = k + c;
      cross.kept_step = k_step;
    }
    attend(cross);
    Linear sum = some.added(x, narrow, c, block.parts[CROSS], nullptr, y);
    sum.kept = change;
    apply(sum);
  }

  // Of one image; x, y and `changes` begin with the first image.
  void add_value_of(const Block& block, long image, const float* x, float* y, float* changes) const {
    const long c = s.channels, begin = image * s.tokens;
    BlockSizes one = s;
    one.batch = one.tokens = 1;
    apply(one.map(block.v + (image * s.keys + single[image]) * c, c, block.parts[CROSS], c, narrow));
    each_row(begin, begin + s.tokens, [&](long row) {
      for (long i = 0; i < c; i++) {
        y[row * c + i] = x[row * c + i] + narrow[i];
        if (changes) changes[row * c + i] = narrow[i];
      }
    });
  }

  template <class F>
  static void each_row(long begin, long end, F f) {
    parallel((end - begin + 63) / 64, [&](long task) {
      for (long row = begin + task * 64; row < std::min(end, begin + task * 64 + 64); row++) f(row);
    });
  }

  // y = x plus self-attention.
  void attend_to_themselves(const Block& block, const BlockSizes& some, const float* rows, const float* x,
                            float* y) const {
    const long c = some.channels;
    apply(some.modulated(x, rows + SHIFT * c, block.parts[QKV], 3 * c, wide));
    Memory memory = divided;
    const Division division(block.division, some, block.parts, wide, memory);
    division.run();
    attend(division.attention(narrow));
    apply(some.added(x, narrow, c, block.parts[PROJ], rows + GATE * c, y));
  }

  // x to y by way of `between`, which may be x. With `twice` the second half of the images is the same as the first:
  // the halves of guidance before they saw their captions.
  void one(const Block& block, const float* rows, const float* x, float* between, float* y, bool twice) const {
    const long c = s.channels;
    BlockSizes some = s;
    if (twice) some.batch /= 2;
    attend_to_themselves(block, some, rows, x, y);
    if (twice) std::copy(y, y + some.rows() * c, y + some.rows() * c);

    if (block.change)
      each_row(0, s.rows(), [&](long row) {
        for (long i = row * c; i < row * c + c; i++) between[i] = y[i] + block.change[i];
      });
    else
      attend_to_caption(block, y, between);

    Linear mlp = s.modulated(between, rows + MLP_SHIFT * c, block.parts[FC1], s.hidden, wide);
    mlp.gelu = true;
    apply(mlp);
    apply(s.added(between, wide, s.hidden, block.parts[FC2], rows + MLP_GATE * c, y));
  }
};

}  // namespace

void run(const Blocks& b) {
  const Workspace memory(Runner::floats(b), false);
  const Runner runner(b, {memory.floats});
  const long size = b.sizes.rows() * b.sizes.channels;
  const bool twice = b.sizes.batch % 2 == 0 && b.sizes.step == 0 && memcmp(b.x, b.x + size / 2, size / 2 * 4) == 0;
  const float* x = b.x;
  for (long i = 0; i < b.count; i++) {
    const bool ends_in_y = (b.count - i) % 2;
    float *y = ends_in_y ? b.y : runner.spare, *between = ends_in_y ? runner.spare : b.y;
    runner.one(b.blocks[i], b.rows + i * ROWS * b.sizes.channels, x, between, y, twice && i == 0);
    x = y;
  }
}

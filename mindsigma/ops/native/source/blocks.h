// Transformer blocks of the DiT, one after the other, in one call.
#pragma once
#include "division.h"

struct Block {
  const float *k, *v;  // of the caption
  const float* change;  // (batch, tokens, channels), instead of what cross-attention adds; or null
  float* kept_change;   // where what it adds is written, too; or null
  Parts<const float> parts;
  DivisionPlan division;
};

struct Blocks {
  BlockSizes sizes;
  const float* x;     // (batch, tokens, channels)
  const float* rows;  // (batch or 1, any, channels): six of each block
  float* y;
  const Block* blocks;
  long count;
  bool masked;  // the caption's keys have a column more, which tells whether they are kept

  // Index of the token of the caption that is kept of an image, -1 if several are, or none. All blocks have one mask.
  long only_token(long image) const {
    if (!masked) return sizes.keys == 1 ? 0 : -1;
    const long step = sizes.channels + 1;
    const float* kept = blocks[0].k + image * sizes.keys * step + sizes.channels;
    long found = -1;
    for (long i = 0; i < sizes.keys; i++) {
      if (kept[i * step] < 0) continue;
      if (found >= 0) return -1;
      found = i;
    }
    return found;
  }
};

void run(const Blocks& blocks);

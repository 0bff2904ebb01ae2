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
};

void run(const Blocks& blocks);

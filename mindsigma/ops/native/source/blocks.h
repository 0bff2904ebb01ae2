// Transformer blocks of the DiT, one after the other, in one call.
#pragma once

// The weights of a block (models/dit/block.py), and the keys and values of the caption.
struct Block {
  const float *k, *v;
  const float *qkv, *qkv_bias, *proj, *proj_bias;
  const float *q, *q_bias, *cross, *cross_bias;
  const float *fc1, *fc1_bias, *fc2, *fc2_bias;
};

struct Blocks {
  const float* x;  // (batch, tokens, channels)
  const float* rows;  // (batch or 1, any, channels): six of each block from the first on
  float* y;
  const Block* blocks;
  long count, batch, tokens, channels, heads, hidden, keys;
  long rows_step;  // from one image's rows to the next one's, or 0
  bool masked;  // keys have a column more, which tells whether they are kept
  float scale, eps;
};

void run(const Blocks& blocks);

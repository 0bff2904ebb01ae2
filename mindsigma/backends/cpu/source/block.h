// A block of the DiT in training, forward and backward.
#pragma once
#include "gradients.h"

// A block's linear maps, in the order of its parameters.
enum Part { QKV, PROJ, Q, KV, CROSS, FC1, FC2, PARTS };

struct Block {
  long batch, tokens, channels, heads, hidden;
  long self_keys, caption_keys;
  const float* x;           // (batch, tokens, channels)
  const float* modulation;  // (batch, 6, channels): shift, scale, gate of self-attention, then of the MLP
  const float* caption;     // (batch, caption_keys, channels)
  const float* mask;        // (batch, caption_keys): a token is dropped if this is 0; or null
  // Queries (batch, tokens, channels), keys and values (batch, self_keys, channels), if x has gone through the map and
  // more already; null: they are that map's.
  const float *q, *k, *v;
  Affine<const float> parts[PARTS];
  float eps;
};

// Gradients, each of the shape of what it belongs to; those of q, k and v only if these were given, else that of QKV.
// Those of the parts may be null: the weights are frozen.
struct BlockGradients {
  float *x, *modulation, *caption, *q, *k, *v;
  Affine<float> parts[PARTS];
};

// Floats that `run_forward` keeps for `run_backward`.
long floats_to_keep(const Block& block);

// The block's result y, (batch, tokens, channels).
void run_forward(const Block& block, float* y, float* kept);

// Gradients from that of y; with kept == nullptr the block is computed again first.
void run_backward(const Block& block, const float* dy, const float* kept, const BlockGradients& gradients);

// A block of the DiT in training: models/dit/branches.py's whole_block, and its backward pass.
#pragma once
#include "division.h"

struct TrainingBlock {
  BlockSizes sizes;
  DivisionPlan division;
  const float* x;           // (batch, tokens, channels)
  const float* modulation;  // (batch, 6 * channels)
  const float* caption;     // (batch, keys, channels)
  const float* kept;        // (batch, keys): a token of the caption is dropped if below 0
  const float* table;       // (6, channels)
  Parts<const float> parts;
};

// Gradients, each of the shape of what it belongs to.
struct TrainingGradients {
  float *x, *modulation, *caption, *table;
  Parts<float> parts;
};

// Floats that `run_forward` keeps for `run_backward`.
long floats_to_keep(const BlockSizes& sizes);

// The block's result y, (batch, tokens, channels).
void run_forward(const TrainingBlock& block, float* y, float* kept);

// Gradients from that of y; with kept == nullptr the block is computed again first.
void run_backward(const TrainingBlock& block, const float* dy, const float* kept, const TrainingGradients& gradients);

// What lies around a DiT's blocks: latents to tokens, tokens to a prediction, the solver's update.
#pragma once
#include "linear.h"

// Latents (batch, channels, height, width) in square patches.
struct Patches {
  long batch, channels, height, width, side;

  long across() const { return width / side; }
  long tokens() const { return height / side * across(); }
  long features() const { return channels * side * side; }
};

// Tokens (batch, tokens, out) of latents: weight (out, features) with channels outermost, bias, position (tokens, out).
void embed(const Patches& patches, const float* latents, const float* weight, const float* bias, const float* position,
           long out, float* tokens);

// `linear`, whose result is (batch * tokens, features) with channels innermost, put together to latents.
void predict(const Patches& patches, Linear linear, float* latents);

// One step of the solver (pipeline/denoising.py, advance).
struct Update {
  const float* latents;     // `count` floats
  const float* history;     // (depth, count), the newest first
  const float* numbers;     // alpha, sigma, keep, weights of the new prediction and of the history
  const float* prediction;  // of each image its noise and more, `step` floats
  const float* guidance;    // scale of guidance, or null: then one prediction, else the unconditional ones come first
  float *y, *kept;          // latents and history after the step
  long images, count, depth, step;
};

void advance(const Update& update);

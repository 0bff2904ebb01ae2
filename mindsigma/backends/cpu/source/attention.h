// Attention of many heads, a block of keys at a time, so that no matrix of weights is kept; and its backward pass.
#pragma once

struct Attention {
  const float *q, *k, *v;  // rows of q_step ..., a head after the other; so is out
  float* out;
  long batch, queries, keys, heads, width;  // width: of a head
  long q_step, k_step, v_step, out_step;
  const float* kept;  // (batch, keys): a key is dropped if this is 0; or null
  const float* bias;  // (batch or 1, heads, queries, keys), added to the scaled products; or null
  long bias_step;     // from one image's to the next one's, or 0
  float* logs;        // (batch, heads, queries): logarithms of the sums of the exponentials are written there; or null
  float scale;        // of the products of queries and keys
};

void attend(const Attention& attention);

struct AttentionGradient {
  Attention forward;    // without a bias; its output and logs are read
  const float* dout;    // gradient of the output, rows of out_step
  float *dq, *dk, *dv;  // gradients, rows of q_step, k_step and v_step; those of dropped keys are 0
};

void attend_backward(const AttentionGradient& gradient);

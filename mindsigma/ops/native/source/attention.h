// Attention of many heads, a block of keys at a time, so that no matrix of weights is kept.
#pragma once
#include <vector>

struct Attention {
  const float* q;  // rows of `q_step`, a head after the other; so are k, v and out
  const float* k;
  const float* v;
  float* out;
  long batch, queries, keys, heads, width;  // width: of a head
  long q_step, k_step, v_step, out_step;
  float scale;  // of the products of queries and keys
  const float* kept = nullptr;  // of key i of an image at [i * kept_step]: dropped if below 0
  long kept_step = 0;
  const float* bias = nullptr;  // (batch or 1, heads, queries, keys), added to the scaled products
  long bias_batch = 0;  // elements from one image's to the next one's, or 0
  float* logs = nullptr;  // (batch, heads, queries): logarithms of the sums of the exponentials are written there
};

void attend(const Attention& attention);

// The keys of each image that are kept; an empty list: all of them.
std::vector<std::vector<int>> kept_keys(const Attention& attention);

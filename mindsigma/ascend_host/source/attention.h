// What the attention kernels share: heads of a tensor in any layout, the mask, a block of scores.
#pragma once

#include <string>

#include "arrays.h"

struct Attention {
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  std::string layout;
  float scale;
  const aclTensor *shift, *mask;  // added to the scores before they are scaled; not 0 where a key is not looked at
  int64_t mode, before, after;    // of the mask: sparse mode, tokens before and after the diagonal
  std::vector<int64_t> prefix;
  bool drop_empty_rows;           // rows without any key give 0 instead of the mean
  Shape query_lengths, key_lengths;  // of every image, where its tokens end earlier; empty: nowhere

  int64_t key_head(int64_t head) const { return head / (heads / key_heads); }
  int64_t block() const;  // rows of scores at once
};

// Arguments of CANN's attention, checked against the documented limits.
struct AttentionArguments {
  const aclTensor *query, *key, *value, *shift, *drop, *padding, *mask;
  const aclIntArray *prefix;
  double scale, keep;
  int64_t before, after, heads;
  const char *layout;
  int64_t precise, mode;
  bool inference = false;  // the limits of the kernels for inference alone
};
Attention attention_of(const AttentionArguments &given);

// Rows of one head of a tensor in a layout, as a view (sequence, width).
aclTensor head_of(const aclTensor *tensor, const std::string &layout, int64_t heads, int64_t batch, int64_t head);

// Shape of what is laid out as `layout` says.
Shape layout_shape(const std::string &layout, int64_t batch, int64_t heads, int64_t sequence, int64_t width);

// The attention itself; maxima and sums of the rows (batch, heads, queries) go where they are asked for.
void attend(const Attention &attention, const aclTensor *query, const aclTensor *key, const aclTensor *value,
            aclTensor *out, const std::string &out_layout, std::vector<float> *tops, std::vector<float> *sums);

// Masked and scaled scores of `rows` queries from `first` on, (rows, keys); what is masked is LOWEST.
constexpr float LOWEST = -3.402823466e38f;
void scores(const Attention &attention, int64_t batch, int64_t head, int64_t first, int64_t rows, const float *query,
            const float *key, std::vector<float> &result);

// row becomes exp(row - top); returns the sum.
double exponentials(float *row, int64_t count, float top);

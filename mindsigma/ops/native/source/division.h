// What self-attention attends with and to: queries, keys and values of the tokens' map to three times their width,
// after norms of queries and keys, and with fewer keys and values (models/dit/branches.py, divide; kv_compression.py).
#pragma once
#include "block.h"
#include "pool.h"

enum class Reduction { NONE, CONVOLUTION, MEAN, FIRST };

struct DivisionPlan {
  bool qk_norm = false;
  Reduction reduction = Reduction::NONE;
  long height = 0, width = 0;  // of the grid of tokens; 0 without a reduction
  long down = 1, across = 1;   // tokens of a cell, of which one key and one value are made

  long cells() const { return height / down * (width / across); }
  bool reduces() const { return reduction != Reduction::NONE; }
};

class Division {
 public:
  // qkv (rows, 3 * channels); takes `floats` of the memory, `receive` takes `floats_of_gradient`.
  Division(const DivisionPlan& plan, const BlockSizes& sizes, const Parts<const float>& parts, const float* qkv,
           Memory& memory);
  static long floats(const DivisionPlan& plan, const BlockSizes& sizes);
  static long floats_of_gradient(const DivisionPlan& plan, const BlockSizes& sizes);

  // Compute them; until then there is only attention's place for them.
  void run() const;
  Attention attention(float* out) const;

  // `from`, of queries, keys and values, where `receive` put them, to dqkv and to the weights' gradients.
  struct Gradients {
    float *q, *k, *v;
    float *raw, *result;  // of a norm: its input, and the gradient of that
    float* of_cells;
  };
  Gradients receive(float* dqkv, Memory& memory) const;
  void backward(const Gradients& from, float* dqkv, const Parts<float>& gradients) const;

 private:
  struct Factors;
  Factors factors() const;
  long token(long image, long cell, long part) const;
  void reduce(const float* x, long step, const Factors& factors, float* to) const;
  void spread(const float* of_cells, const Factors& factors, float* dx, long step) const;
  void gradient_of_factors(const float* of_cells, long parts, float* gradient) const;
  void through_norm(Part part, long column, const float* dy, const Gradients& from, float* dqkv,
                    const Parts<float>& gradients) const;
  long of_cells() const { return s.batch * plan.cells() * s.channels; }  // floats of the keys, or of the values

  DivisionPlan plan;
  const BlockSizes& s;
  const Parts<const float>& parts;
  const float* qkv;
  float *q = nullptr, *k = nullptr;           // after their norms
  float *cells = nullptr, *normed = nullptr;  // of keys, then of values: sums, and after their norm
};

// Products of matrices: those of oneDNN, which MindSpore brings along, on tiles that the threads share.
#pragma once
#include <functional>

// A matrix, its rows `step` floats apart; or the transpose of that.
struct Matrix {
  const float* data;
  long step;
  bool turned = false;
};

// c (m, n), its rows c_step apart, = factor * a (m, k) b (k, n), plus what is there if `added`; by this thread alone.
void multiply(long m, long n, long k, Matrix a, Matrix b, float* c, long c_step, float factor = 1, bool added = false);

// Part of a result.
struct Tile {
  long row, rows, column, columns;
};

// The same by all threads; whoever made a tile calls `after` with it, if there is one, while it is near.
void multiply_together(long m, long n, long k, Matrix a, Matrix b, float* c, long c_step,
                       const std::function<void(const Tile&)>& after = nullptr);

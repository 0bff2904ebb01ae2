// Products of fp32 matrices on AMX tiles, which multiply bfloat16: a number is the sum of three of these without a
// rest, and of the nine products of the parts of two numbers the six largest are summed in fp32. The others are below
// its rounding. (arXiv 1904.06376)
#pragma once

constexpr long SIDE = 32;               // rows and columns of a product of blocks
constexpr long STEP = 32;               // of its depth
constexpr long PARTS_OF_STEP = 3 * SIDE * STEP / 2;  // floats that the three parts of a block and a step take

// Whether this processor has them and the system lets us use them; not if MINDSIGMA_AMX is 0.
bool has_amx();

// SIDE rows of x, `stride` apart, as the left factor: steps (depth / STEP rounded up, PARTS_OF_STEP), 64-byte aligned.
// Zeros stand for what is missing.
void split_left(const float* x, long stride, long rows, long depth, float* to);

// SIDE columns of w as the right factor, w (columns, depth) or, if `turned`, (depth, columns), its rows `stride` apart.
void split_right(const float* w, long stride, long columns, long depth, bool turned, float* to);

// The tiles of this thread, set up as `multiply_parts` needs them.
struct Tiles {
  Tiles();
  ~Tiles();
};

// product (SIDE, SIDE) = left times right, over `steps`.
void multiply_parts(const float* left, const float* right, long steps, float* product);

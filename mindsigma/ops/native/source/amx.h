// Products of fp32 matrices on AMX tiles, which multiply bfloat16: a number is the sum of three of these without a
// rest, and of the nine products of the parts of two numbers the six largest are summed in fp32. The others are below
// its rounding. (arXiv 1904.06376) So for numbers from 2^-110 to 2^127; smaller ones lose parts, an infinity gives NaN.
#pragma once

constexpr long AMX_SIDE = 32;  // rows and columns of a product of blocks
constexpr long AMX_STEP = 32;  // of its depth
constexpr long PARTS_OF_STEP = 3 * AMX_SIDE * AMX_STEP / 2;  // floats that the three parts of a block and a step take

// Whether this processor has them and the system lets us use them; not if MINDSIGMA_AMX is 0.
bool has_amx();

// AMX_SIDE rows of x, `stride` apart, as the left factor: (depth / AMX_STEP rounded up, PARTS_OF_STEP) in memory that
// is aligned to 64 bytes. Zeros stand for what is missing.
void split_left(const float* x, long stride, long rows, long depth, float* to);

// AMX_SIDE columns of w as the right factor; w (columns, depth) or, if `turned`, (depth, columns), rows `stride` apart.
void split_right(const float* w, long stride, long columns, long depth, bool turned, float* to);

// The tiles of this thread, set up as `multiply_parts` needs them.
struct Tiles {
  Tiles();
  ~Tiles();
};

// product (AMX_SIDE, AMX_SIDE) = left times right, over `steps`.
void multiply_parts(const float* left, const float* right, long steps, float* product);

// The products of a linear map's backward pass, as linear maps themselves.
#include "gradients.h"

#include <algorithm>

#include "linear.h"
#include "pool.h"
#include "vector.h"

namespace {

constexpr long STRIPE = 64;  // rows or columns of a task
constexpr long SUMMED = 128;  // rows that are summed one after the other before their sum joins the others

// to (columns, rows) = the transpose of x (rows, columns).
void turn(const float* x, float* to, long rows, long columns) {
  parallel((rows + STRIPE - 1) / STRIPE, [&](long task) {
    const long begin = task * STRIPE, end = std::min(rows, begin + STRIPE);
    for (long column = 0; column < columns; column += VL) {
      long row = begin;
      if (column + VL <= columns) {
        for (; row + VL <= end; row += VL) {
          V square[VL];
#pragma GCC unroll 16
          for (int i = 0; i < VL; i++) square[i] = load(x + (row + i) * columns + column);
          transpose(square);
#pragma GCC unroll 16
          for (int i = 0; i < VL; i++) store(to + (column + i) * rows + row, square[i]);
        }
      }
      for (; row < end; row++)
        for (long c = column; c < std::min(columns, column + VL); c++) to[c * rows + row] = x[row * columns + c];
    }
  });
}

Linear product(const float* x, const float* weight, float* y, long rows, long in, long out) {
  Linear l{};
  l.x = x;
  l.weight = weight;
  l.turned = true;
  l.y = y;
  l.rows = l.rows_of_image = rows;
  l.in = in;
  l.out = out;
  return l;
}

}  // namespace

void gradient_of_input(const float* dy, const float* weight, float* dx, long rows, long in, long out) {
  apply(product(dy, weight, dx, rows, out, in));
}

void gradient_of_weight(const float* dy, const float* x, float* dw, long rows, long in, long out) {
  float* turned = scratch(2, rows * out);
  turn(dy, turned, rows, out);
  apply(product(turned, x, dw, out, rows, in));
}

void gradient_of_bias(const float* dy, float* db, long rows, long out) {
  parallel((out + STRIPE - 1) / STRIPE, [&](long task) {
    const long begin = task * STRIPE, width = std::min(STRIPE, out - begin);
    float sums[STRIPE] = {};
    for (long first = 0; first < rows; first += SUMMED) {
      float part[STRIPE] = {};
      for (long row = first; row < std::min(rows, first + SUMMED); row++)
        for (long i = 0; i < width; i++) part[i] += dy[row * out + begin + i];
      for (long i = 0; i < width; i++) sums[i] += part[i];
    }
    std::copy(sums, sums + width, db + begin);
  });
}

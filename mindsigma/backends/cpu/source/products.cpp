// oneDNN computes in the calling thread, as MindSpore's is built for a pool of threads that it is not given here. What
// an element of a product is summed from, and in which order, does not depend on the tile that it lies in.
#include "products.h"

#include <algorithm>

#include "pool.h"

namespace {

// dnnl_sgemm, for matrices stored row by row.
using Sgemm = int (*)(char, char, long, long, long, float, const float*, long, const float*, long, float, float*, long);
Sgemm sgemm = nullptr;

constexpr long ROWS = 8, COLUMNS = 48;  // multiples of which oneDNN's kernels compute
constexpr long LARGEST = 384 * 1024;    // floats of a tile; half of it made XL/2 at 512 px 4 % slower
constexpr long FAR = 256 * 1024;  // floats of weights that the second cache does not hold from one call to the next
constexpr long COST_OF_COPY = 8;  // of an element of a or b, in multiplications

long pieces(long n, long size) { return (n + size - 1) / size; }

// How many tiles there are down and across, so that all threads end at about the same time.
struct Shares {
  long down = 1, across = 1;

  Shares(long m, long n) {
    const long threads = sharing_threads();
    double least = -1;
    for (long d = pieces(m, 512); d <= std::max<long>(pieces(m, 512), std::min(pieces(m, 64), 4 * threads)); d++) {
      const long rows = pieces(pieces(m, d), ROWS) * ROWS;
      const long fewest = std::min(pieces(n, COLUMNS), pieces(n * rows, LARGEST));
      const long rounds = pieces(fewest * d, threads);
      for (long round = rounds; round < rounds + 3; round++) {
        const long a = std::clamp(round * threads / d, fewest, pieces(n, COLUMNS));
        const long columns = pieces(pieces(n, a), COLUMNS) * COLUMNS;
        const double cost = double(pieces(a * d, threads)) * (rows * columns + COST_OF_COPY * (rows + columns));
        if (least < 0 || cost < least) least = cost, down = d, across = a;
      }
    }
  }
};

}  // namespace

extern "C" void use_products(void* function) { sgemm = reinterpret_cast<Sgemm>(function); }

void multiply(long m, long n, long k, Matrix a, Matrix b, float* c, long c_step, float factor, bool added) {
  sgemm(a.turned ? 'T' : 'N', b.turned ? 'T' : 'N', m, n, k, factor, a.data, a.step, b.data, b.step, added, c, c_step);
}

void multiply_together(long m, long n, long k, Matrix a, Matrix b, float* c, long c_step,
                       const std::function<void(const Tile&)>& after) {
  const Shares shares(m, n);
  const long height = pieces(pieces(m, shares.down), ROWS) * ROWS;
  const long width = pieces(pieces(n, shares.across), COLUMNS) * COLUMNS;
  const long down = pieces(m, height), across = pieces(n, width);
  parallel(down * across, [&](long task) {
    const long row = task % down * height, column = task / down * width;
    const Tile tile{row, std::min(height, m - row), column, std::min(width, n - column)};
    const Matrix left{a.data + row * (a.turned ? 1 : a.step), a.step, a.turned};
    const Matrix right{b.data + column * (b.turned ? b.step : 1), b.step, b.turned};
    // Weights that are far are asked for row by row, in the order that the processor expects.
    if (right.turned && tile.columns * k > FAR)
      for (long i = 0; i < tile.columns; i++)
        for (long j = 0; j < k; j += 16) __builtin_prefetch(right.data + i * right.step + j, 0, 2);
    multiply(tile.rows, tile.columns, k, left, right, c + row * c_step + column, c_step);
    if (after) after(tile);
  });
}

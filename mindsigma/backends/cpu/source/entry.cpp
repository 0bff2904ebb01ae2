// The functions that Python calls (kernels.py mirrors their structs): 0 if all went well, 1 without memory.
#include "attention.h"
#include "block.h"
#include "gradients.h"
#include "images.h"
#include "linear.h"
#include "pool.h"

namespace {

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace

extern "C" {

int threads() { return thread_count(); }

void apart(int more) { compute_apart(more); }

int linear(const Linear* l) {
  return guarded([&] { apply(*l); });
}

int attention(const Attention* a) {
  return guarded([&] { attend(*a); });
}

int group_normalisation(const float* x, const float* weight, const float* bias, float* y, long batch, long channels,
                        long pixels, long groups, float eps, int activate) {
  return guarded([&] { group_norm(x, weight, bias, y, batch, channels, pixels, groups, eps, activate); });
}

int convolution(const Convolution* c) {
  return guarded([&] { convolve(*c); });
}

int modulated_gradient(const ModulatedGradient* g) {
  return guarded([&] {
    Workspace workspace(2 * g->images.count * g->images.rows * g->in);
    gradient_of_modulated(*g, workspace.floats);
  });
}

long block_floats(const Block* b) { return floats_to_keep(*b); }

int block_forward(const Block* b, float* y, float* kept) {
  return guarded([&] { run_forward(*b, y, kept); });
}

int block_backward(const Block* b, const float* dy, const float* kept, const BlockGradients* gradients) {
  return guarded([&] { run_backward(*b, dy, kept, *gradients); });
}
}

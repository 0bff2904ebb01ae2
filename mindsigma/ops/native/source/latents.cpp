#include "latents.h"

#include <algorithm>

#include "pool.h"

// Calls f(token, place in the channel, row of the patch) for every row of every patch.
template <class F>
static void each_patch_row(const Patches& p, F f) {
  for (long row = 0; row < p.height; row++)
    for (long column = 0; column < p.across(); column++)
      f(row / p.side * p.across() + column, row * p.width + column * p.side, row % p.side);
}

void embed(const Patches& p, const float* latents, const float* weight, const float* bias, const float* position,
           long out, float* tokens) {
  float* patches = scratch(2, p.tokens() * p.features());
  for (long image = 0; image < p.batch; image++) {
    for (long channel = 0; channel < p.channels; channel++) {
      const float* from = latents + (image * p.channels + channel) * p.height * p.width;
      each_patch_row(p, [&](long token, long place, long row) {
        std::copy(from + place, from + place + p.side,
                  patches + token * p.features() + (channel * p.side + row) * p.side);
      });
    }
    Linear l{};
    l.x = patches;
    l.rows = l.rows_of_image = p.tokens();
    l.in = p.features();
    l.weight = weight;
    l.bias = bias;
    l.out = out;
    l.residual = position;
    l.y = tokens + image * p.tokens() * out;
    apply(l);
  }
}

void predict(const Patches& p, Linear linear, float* latents) {
  linear.y = scratch(2, p.batch * p.tokens() * p.features());
  apply(linear);
  for (long image = 0; image < p.batch; image++) {
    const float* from = linear.y + image * p.tokens() * p.features();
    for (long channel = 0; channel < p.channels; channel++) {
      float* to = latents + (image * p.channels + channel) * p.height * p.width;
      each_patch_row(p, [&](long token, long place, long row) {
        for (long i = 0; i < p.side; i++)
          to[place + i] = from[token * p.features() + (row * p.side + i) * p.channels + channel];
      });
    }
  }
}

void advance(const Update& u) {
  const float alpha = u.numbers[0], sigma = u.numbers[1], keep = u.numbers[2];
  const float* weights = u.numbers + 3;
  const long each = u.count / u.images;
  for (long image = 0; image < u.images; image++)
    for (long i = 0; i < each; i++) {
      const long place = image * each + i;
      float noise = u.prediction[image * u.step + i];
      if (u.guidance) noise += *u.guidance * (u.prediction[(u.images + image) * u.step + i] - noise);
      const float clean = (u.latents[place] - sigma * noise) / alpha;
      float y = keep * u.latents[place] + weights[0] * clean;
      for (long k = 0; k < u.depth; k++) y += weights[1 + k] * u.history[k * u.count + place];
      u.y[place] = y;
      u.kept[place] = clean;
    }
  std::copy(u.history, u.history + (u.depth - 1) * u.count, u.kept + u.count);
}

// A linear map of rows with what comes before and after it.
#pragma once

struct Linear {
  const float* x;  // (rows, in)
  const float* weight;  // (out, in); or (in, out), if `turned`
  float* y;  // (rows, out)
  long rows, in, out;
  bool turned = false;
  long rows_of_image;  // rows that share one row of shift, scale and gate
  // Before: nothing; or LayerNorm, times scale, plus shift; or x / rms(x) times norm_weight.
  const float* shift = nullptr;  // a row for each image, `step` apart; 0: one for all
  const float* scale = nullptr;
  const float* norm_weight = nullptr;
  float eps = 0;
  // After: plus bias, GELU, times factor, times gate, plus residual; each only if given.
  const float* bias = nullptr;  // (out,)
  bool gelu = false;
  const float* factor = nullptr;  // (rows, out)
  const float* gate = nullptr;  // a row for each image, `step` apart; 0: one for all
  const float* residual = nullptr;  // (rows, out)
  long step = 0;
};

void apply(const Linear& linear);

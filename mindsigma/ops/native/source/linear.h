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
  float* kept = nullptr;  // (rows, out): what it is before GELU, gate and residual is written there, too
  bool gelu = false;
  // Times the derivative of GELU at gelu_input; GELU itself of that is written to gelu_output. Both (rows, out).
  const float* gelu_input = nullptr;
  float* gelu_output = nullptr;
  const float* factor = nullptr;  // (rows, out)
  const float* gate = nullptr;  // a row for each image, `step` apart; 0: one for all
  const float* residual = nullptr;  // (rows, out)
  long step = 0;
};

void apply(const Linear& linear);

// What the linear map is of: its input after the norm, (rows, in).
void normalise(const Linear& linear, float* to);

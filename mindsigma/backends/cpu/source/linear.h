// A linear map of rows with what comes before and after it.
#pragma once

struct Linear {
  const float* x;       // rows of `in`, x_step apart
  const float* weight;  // (out, in); or (in, out), if `turned`
  float* y;             // (rows, out)
  long rows, in, out, x_step;
  long rows_of_image;  // rows that share one row of shift, scale and gate
  long step;           // from one image's shift, scale and gate to the next one's, or 0: one for all
  // Before: nothing; or LayerNorm, times scale, plus shift; or x / rms(x) times norm_weight.
  const float *shift, *scale, *norm_weight;
  // After: plus bias, GELU (or its slope), times factor, times gate, plus residual; each only if given.
  const float* bias;        // (out,)
  const float* factor;      // (rows, out)
  const float* gate;        // a row of `out` for each image
  const float* residual;    // (rows, out); not y
  float* kept;              // (rows, out): what it is before GELU, gate and residual is written there, too
  const float* gelu_input;  // (rows, out): times the derivative of GELU there; GELU itself of that to gelu_output
  float* gelu_output;
  float eps;
  int gelu, turned;
};

void apply(const Linear& linear);

// Rows begin ... end - 1 of what the linear map is of: its input after the norm, (end - begin, in).
void normalise(const Linear& linear, long begin, long end, float* to);

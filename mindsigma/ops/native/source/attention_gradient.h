// The backward pass of attention.
#pragma once
#include "attention.h"

struct AttentionGradient {
  Attention forward;  // its output is read
  const float* logs;  // see Attention
  const float* dout;  // gradient of the output, rows of out_step
  float *dq, *dk, *dv;  // gradients, rows of q_step, k_step and v_step; those of dropped keys are 0
};

void attend_backward(const AttentionGradient& gradient);

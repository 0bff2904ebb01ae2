// Gradients of a linear map y = x w^T + bias of x (rows, in), from those of y, dy (rows, out).
#pragma once

// dy w: (rows, in); w (out, in).
void gradient_of_input(const float* dy, const float* weight, float* dx, long rows, long in, long out);

// dy^T x: (out, in).
void gradient_of_weight(const float* dy, const float* x, float* dw, long rows, long in, long out);

// Sums of the columns of dy: (out,).
void gradient_of_bias(const float* dy, float* db, long rows, long out);

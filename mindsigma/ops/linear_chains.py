"""Linear maps together with the norm before or the pointwise work after them: one pass each on the native kernels."""

from mindsigma.ops.derivatives import native_modulated_linear
from mindsigma.ops.functional import gelu_tanh, layer_norm, linear, rms_norm, scale_and_shift, spread_rows
from mindsigma.ops.kernels import is_learning_natively, is_native
from mindsigma.ops.native import operations as native


def takes_natively(x, weight, kernels):
    """Whether the native kernels take this: not with low-rank changes beside the weight."""
    return is_native(x, kernels) and not isinstance(weight, tuple)


def plain_linear(x, kernels, weight, bias):
    """`linear` of x (N, T, in)."""
    if takes_natively(x, weight, kernels):
        return native.linear(x, weight, bias)
    return linear(x, weight, bias, kernels)


def modulated_norm(x, rows, shift_row, eps, kernels):
    """LayerNorm without affine of x (N, T, C), times a scale, plus a shift.

    Args:
        rows: (N or 1, R, C); row `shift_row` is the shift, the one after it the scale.
    """
    shift, scale = rows[:, shift_row : shift_row + 1], rows[:, shift_row + 1 : shift_row + 2]
    return scale_and_shift(layer_norm(x, eps, kernels), scale, shift, kernels)


def modulated_linear(x, rows, shift_row, eps, kernels, weight, bias):
    """Linear map of `modulated_norm` of x (N, T, in)."""
    if takes_natively(x, weight, kernels):
        return native.linear(x, weight, bias, rows=rows, shift_row=shift_row, eps=eps)
    if is_learning_natively(x, kernels) and not isinstance(weight, tuple):
        return native_modulated_linear(x, rows[:, shift_row : shift_row + 2], eps, weight, bias)
    return linear(modulated_norm(x, rows, shift_row, eps, kernels), weight, bias, kernels)


def modulated_linear_gelu(x, rows, shift_row, eps, kernels, weight, bias):
    """GELU (tanh) of `modulated_linear`."""
    if takes_natively(x, weight, kernels):
        return native.linear(x, weight, bias, rows=rows, shift_row=shift_row, eps=eps, gelu=True)
    return gelu_tanh(modulated_linear(x, rows, shift_row, eps, kernels, weight, bias), kernels)


def linear_gelu(x, kernels, weight, bias):
    """GELU (tanh) of a linear map of x (N, T, in)."""
    if takes_natively(x, weight, kernels):
        return native.linear(x, weight, bias, gelu=True)
    return gelu_tanh(linear(x, weight, bias, kernels), kernels)


def gelu_linear(x, kernels, weight, bias):
    """Linear map of GELU(x) (N, T, in)."""
    return plain_linear(gelu_tanh(x, kernels), kernels, weight, bias)


def add_linear(residual, x, kernels, weight, bias):
    """residual (N, T, out) plus a linear map of x (N, T, in)."""
    if takes_natively(x, weight, kernels) and native.takes(residual):
        return native.linear(x, weight, bias, residual=residual)
    return residual + linear(x, weight, bias, kernels).astype(residual.dtype)


def add_gated(residual, x, rows, gate_row, kernels):
    """residual plus rows[:, gate_row] times x, both (N, T, C); rows (N or 1, R, C)."""
    return residual + spread_rows(rows[:, gate_row : gate_row + 1], residual.shape, kernels) * x


def add_gated_linear(residual, x, rows, gate_row, kernels, weight, bias):
    """`add_gated` of a linear map of x (N, T, in)."""
    if takes_natively(x, weight, kernels):
        return native.linear(x, weight, bias, rows=rows, gate_row=gate_row, residual=residual)
    return add_gated(residual, linear(x, weight, bias, kernels), rows, gate_row, kernels)


def rms_linear(x, norm_weight, eps, weight, kernels):
    """Linear map, in the dtype of its weight, of T5's norm of x (N, L, in)."""
    if takes_natively(x, weight, kernels) and native.takes(weight):
        return native.linear(x, weight, norm_weight=norm_weight, eps=eps)
    return linear(rms_norm(x, eps, kernels, norm_weight).astype(weight.dtype), weight)


def rms_gated_linear(x, norm_weight, eps, weight_0, weight_1, dtype, kernels):
    """T5's gated GELU of its norm of x (N, L, in): GELU of one linear map times another, in `dtype`."""
    if takes_natively(x, weight_0, kernels) and native.takes(weight_0):
        gate = native.linear(x, weight_0, norm_weight=norm_weight, eps=eps, gelu=True)
        return native.linear(x, weight_1, norm_weight=norm_weight, eps=eps, factor=gate)
    h = rms_norm(x, eps, kernels, norm_weight).astype(weight_0.dtype)
    gate = gelu_tanh(linear(h, weight_0), kernels).astype(dtype)
    return gate * linear(h, weight_1).astype(dtype)

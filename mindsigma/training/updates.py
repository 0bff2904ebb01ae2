"""What a training step does with the gradients, as pure functions of tensors and as assignments: norms, loss scale,
optimiser, moving average.
"""

import mindspore as ms
from mindspore import ops

from mindsigma.training.optimizers import averaged, update

# Elements of the control tensor, which the step itself carries on: it must not depend on the host to know of overflows.
CORRECTION_1, CORRECTION_2, SCALE, GOOD_STEPS, SKIPPED, SKIPPED_IN_A_ROW, UPDATES = range(7)
CONTROLS = 7
MAX_SCALE = 2.0**24


def square_sum(x):
    """Sum of squares, fp32 (1,)."""
    x = x.astype(ms.float32).reshape(1, -1)
    return (x * x).sum().reshape(1)


def unscale_and_clip(squares, controls, rate, max_norm, scaled, scale_window, accumulation, betas):
    """What the update needs to know.

    Args:
        squares: fp32 (K,): squared norms of the gradients, still times loss scale and number of micro-batches.
        controls: fp32 (CONTROLS,).
        rate: fp32 (1,), learning rate.
        max_norm: largest norm of the gradient after the clip; 0: no clip.
        scaled: whether the loss scale moves; it doubles after `scale_window` updates without an overflow.
        accumulation: number of micro-batches that the gradients are sums of.
        betas: decays of the optimiser (optimizers.decays), for the correction of its averages.

    Returns:
        numbers for optimizers.update, norm of the true gradient (1,), finite as fp32 0 or 1 (1,), and new controls.
    """
    one = ops.ones((1,), ms.float32)
    scale = controls[SCALE : SCALE + 1]
    true = 1.0 / (scale * accumulation)
    norm = ops.sqrt(squares.sum().reshape(1)) * true
    updates = ops.isfinite(norm)
    finite = updates.astype(ms.float32)
    clip = ops.minimum(max_norm / (norm + 1e-6), one) if max_norm > 0 else one

    old_1, old_2 = controls[CORRECTION_1 : CORRECTION_1 + 1], controls[CORRECTION_2 : CORRECTION_2 + 1]
    correction_1 = ops.select(updates, old_1 * betas[0][0] + betas[0][1], old_1)
    correction_2 = ops.select(updates, old_2 * betas[1][0] + betas[1][1], old_2)
    zero = one * 0.0
    good = ops.select(updates, controls[GOOD_STEPS : GOOD_STEPS + 1] + 1.0, zero)
    if scaled:
        grown = good >= scale_window
        larger = ops.minimum(scale * 2.0, one * MAX_SCALE)
        scale = ops.select(updates, ops.select(grown, larger, scale), ops.maximum(scale * 0.5, one))
        good = ops.select(grown, zero, good)
    missed = 1.0 - finite
    skipped = controls[SKIPPED : SKIPPED + 1] + missed
    in_a_row = ops.select(updates, zero, controls[SKIPPED_IN_A_ROW : SKIPPED_IN_A_ROW + 1] + missed)
    count = controls[UPDATES : UPDATES + 1] + finite
    numbers = ops.concat((rate, correction_1, correction_2, clip * true))
    controls = ops.concat((correction_1, correction_2, scale, good, skipped, in_a_row, count))
    return numbers, norm, finite, controls


def assign_if(finite, variable, value):
    """Give a Parameter a value where finite (1,) is 1."""
    keep = ops.broadcast_to((finite > 0.5).reshape((1,) * len(variable.shape)), variable.shape)
    return ops.assign(variable, ops.select(keep, value, variable))


def update_tensor(name, betas, eps, weight_decay, clip_threshold, values, finite, parameter, gradient, *states):
    """optimizers.update of Parameters in place, where `finite` is 1."""
    news = update(parameter, gradient, values, name, betas, eps, weight_decay, clip_threshold, *states)
    assign_if(finite, parameter, news[0])
    for j in range(len(states)):
        assign_if(finite, states[j], news[1 + j])
    return finite


def update_average(finite, decay, mean, parameter):
    """Moving average in place, where `finite` is 1; decay: a pair (beta, 1 - beta)."""
    return assign_if(finite, mean, averaged(mean, parameter, decay))

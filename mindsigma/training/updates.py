"""What a training step does with the gradients, as pure functions of tensors and as assignments: norms, loss scale,
optimiser, moving average.
"""

import mindspore as ms
from mindspore import ops

from mindsigma.ops.operators import assign, each, filled, split

# Elements of the control tensor, which the step itself carries on: it must not depend on the host to know of overflows.
CORRECTION_1, CORRECTION_2, SCALE, GOOD_STEPS, SKIPPED, SKIPPED_IN_A_ROW, UPDATES = range(7)
CONTROLS = 7
MAX_SCALE = 2.0**24


def square_sum(x):
    """Sum of squares (1,) of an fp32 tensor."""
    x = x.reshape(1, -1)
    return ops.sum(x * x).reshape(1)


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
        numbers for Optimizer.update, norm of the true gradient (1,), finite as fp32 0 or 1 (1,), and new controls.
    """
    one = filled((1,), 1.0, ms.float32)
    old = split(controls, CONTROLS, 0)
    scale = old[SCALE]
    true = 1.0 / (scale * accumulation)
    norm = ops.sqrt(squares.sum().reshape(1)) * true
    updates = ops.isfinite(norm)
    finite = updates.astype(ms.float32)
    clip = ops.minimum(max_norm / (norm + 1e-6), one) if max_norm > 0 else one

    old_1, old_2 = old[CORRECTION_1], old[CORRECTION_2]
    correction_1 = ops.select(updates, old_1 * betas[0][0] + betas[0][1], old_1)
    correction_2 = ops.select(updates, old_2 * betas[1][0] + betas[1][1], old_2)
    zero = filled((1,), 0.0, ms.float32)
    good = ops.select(updates, old[GOOD_STEPS] + 1.0, zero)
    if scaled:
        grown = good >= scale_window
        larger = ops.minimum(scale * 2.0, one * MAX_SCALE)
        scale = ops.select(updates, ops.select(grown, larger, scale), ops.maximum(scale * 0.5, one))
        good = ops.select(grown, zero, good)
    missed = 1.0 - finite
    skipped = old[SKIPPED] + missed
    in_a_row = ops.select(updates, zero, old[SKIPPED_IN_A_ROW] + missed)
    count = old[UPDATES] + finite
    numbers = ops.concat((rate, correction_1, correction_2, clip * true))
    controls = ops.concat((correction_1, correction_2, scale, good, skipped, in_a_row, count))
    return numbers, norm, finite, controls


def if_finite(finite, value, variable):
    """`value` where finite, bool (1,), is true, else `variable`, of one shape."""
    return ops.select(ops.broadcast_to(finite.reshape((1,) * len(variable.shape)), variable.shape), value, variable)


def assign_if(write, finite, variable, value):
    """Give a Parameter a value of its shape where finite, bool (1,), is true. `write`: `assign`, or `direct` of it."""
    return write(variable, if_finite(finite, value, variable))


def assign_all(write, variables, values):
    """Give K Parameters of one shape the values (K, *shape). Returns what was written."""
    # Pieces are no views, for which MindSpore would copy every Parameter first.
    return each(ops.partial(assign_piece, write), variables, split(values, len(variables), 0))


def assign_piece(write, variable, piece):
    """Give a Parameter a value of as many elements."""
    return write(variable, piece.reshape(variable.shape))


def emptied(variable, read):
    """`read`, what was computed from a Parameter, which has zeros then."""
    return ops.depend(read, assign(variable, ops.depend(ops.zeros_like(variable), read)))

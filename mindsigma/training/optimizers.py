"""AdamW, Lion and CAME as pure functions of one tensor: (parameter, gradient, numbers, states) to their successors.

Libraries' optimisers write their parameters themselves. As functions they can leave an overflowed step out, be given to
the ranks that own a tensor, and run as one compiled graph a shape on a CPU; and CAME's factored second moment is an
outer product by MatMul, where a broadcast would keep index tables of four times the tensor's size (MindSpore's CPU
backend). mindone.trainers' CAME and torch.optim.AdamW are the references in the tests.
"""

from dataclasses import dataclass, field
from typing import Tuple

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from mindsigma.errors import MindSigmaError
from mindsigma.ops.native import direct

_adam = ops.Adam()
_outer = ops.MatMul()
_divide = ops.RealDiv()  # `/` keeps index tables on a CPU even where nothing is broadcast

# Columns of `numbers`, the fp32 tensor that a step gives every update.
LEARNING_RATE, CORRECTION_1, CORRECTION_2, CLIP = range(4)
NUMBERS = 4


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimiser, and its constants.

    Attributes:
        name: "came" (arXiv 2307.02047), "adamw" or "lion" (arXiv 2302.06675).
        betas: decay of the averages; CAME has three. None: the optimiser's usual ones.
        eps: AdamW one, CAME two. None: the usual ones.
        weight_decay: decoupled: the parameter shrinks by learning rate times this.
        clip_threshold: CAME's limit of the root mean square of an update.
    """

    name: str = "came"
    betas: Tuple[float, ...] = None
    eps: Tuple[float, ...] = None
    weight_decay: float = 0.0
    clip_threshold: float = 1.0
    states: Tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self):
        if self.name not in DEFAULTS:
            raise MindSigmaError(f"optimizer must be one of {', '.join(DEFAULTS)}, not {self.name!r}")
        betas, eps = DEFAULTS[self.name]
        for name, given, usual in (("betas", self.betas, betas), ("eps", self.eps, eps)):
            value = usual if given is None else tuple(given)
            if len(value) != len(usual):
                raise MindSigmaError(f"{name} of {self.name} are {len(usual)} numbers, not {value}")
            object.__setattr__(self, name, value)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise MindSigmaError(f"betas must lie in [0, 1), not {self.betas}")
        if not self.weight_decay >= 0:
            raise MindSigmaError(f"weight_decay must not be negative, not {self.weight_decay!r}")


# name: (betas, eps)
DEFAULTS = {
    "came": ((0.9, 0.999, 0.9999), (1e-30, 1e-16)),
    "adamw": ((0.9, 0.999), (1e-8,)),
    "lion": ((0.9, 0.99), ()),
}


def state_shapes(config, shape):
    """dict name -> shape of the fp32 states of a tensor, all zero at the start, in the order `update` takes them."""
    shape = tuple(shape)
    if config.name == "adamw":
        return {"m": shape, "v": shape}
    if config.name == "lion":
        return {"m": shape}
    if len(shape) < 2:
        return {"m": shape, "v": shape}
    row, column = shape[:-1], shape[:-2] + shape[-1:]
    return {"m": shape, "v_row": row, "v_column": column, "residual_row": row, "residual_column": column}


def static_arguments(config):
    """What `update` takes of an OptimizerConfig, as constants of a graph."""
    return config.name, config.betas, config.eps, float(config.weight_decay), float(config.clip_threshold)


def update(parameter, gradient, numbers, name, betas, eps, weight_decay, clip_threshold, *states):
    """One step of a tensor.

    Args:
        parameter, gradient: fp32, of one shape.
        numbers: fp32 (NUMBERS,): learning rate, 1 - beta1^n and 1 - beta2^n after n updates, factor of the gradient.
        name, betas, eps, weight_decay, clip_threshold: see `static_arguments`.
        states: as `state_shapes` lists them.

    Returns:
        tuple: the parameter and the states after the step.
    """
    gradient = gradient * numbers[CLIP]
    rate = numbers[LEARNING_RATE]
    step, states = _step(gradient, numbers, name, betas, eps, clip_threshold, *states)
    if weight_decay > 0:
        parameter = parameter * (1.0 - rate * weight_decay)
    return (parameter - rate * step,) + states


def _step(gradient, numbers, name, betas, eps, clip_threshold, *states):
    if name == "adamw":
        return _adamw(gradient, numbers, betas, eps, *states)
    if name == "lion":
        return _lion(gradient, betas, *states)
    return _came(gradient, betas, eps, clip_threshold, *states)


def _adamw(gradient, numbers, betas, eps, m, v):
    beta1, beta2 = betas
    m = beta1 * m + (1.0 - beta1) * gradient
    v = beta2 * v + (1.0 - beta2) * gradient * gradient
    root = ops.sqrt(v * (1.0 / numbers[CORRECTION_2])) + eps[0]
    return _divide(m * (1.0 / numbers[CORRECTION_1]), root), (m, v)


def adamw_in_place(numbers, betas, eps, weight_decay, parameters, gradients, m, v):
    """`update` of AdamW for lists of Parameters in place, from PyNative, where one kernel passes over memory once.

    `numbers` as for `update`; the corrections go into the rate and into eps.
    """
    rate, correction_1, correction_2, clip = numbers.asnumpy().astype(np.float64)
    root = correction_2**0.5
    decay, rate, eps = 1.0 - rate * weight_decay, rate * root / correction_1, eps[0] * root
    if direct.available():
        for tensors in zip(parameters, gradients, m, v):
            direct.update_adamw(*tensors, clip, decay, rate, *betas, eps)
        return
    # The operation's own corrections would lose fp32's last digits.
    factors = [Tensor(factor, mstype.float32) for factor in (0.0, 0.0, rate, *betas, eps)]
    for parameter, gradient, first, second in zip(parameters, gradients, m, v):
        if weight_decay > 0:
            ops.assign(parameter, parameter * float(decay))
        _adam(parameter, first, second, *factors, gradient * float(clip))


def _lion(gradient, betas, m):
    beta1, beta2 = betas
    step = ops.sign(beta1 * m + (1.0 - beta1) * gradient)
    return step, (beta2 * m + (1.0 - beta2) * gradient,)


def _came(gradient, betas, eps, clip_threshold, m, *moments):
    if len(gradient.shape) < 2:
        return _came_vector(gradient, betas, eps, clip_threshold, m, *moments)
    return _came_matrix(gradient, betas, eps, clip_threshold, m, *moments)


def _came_vector(gradient, betas, eps, clip_threshold, m, v):
    v = betas[1] * v + (1.0 - betas[1]) * (gradient * gradient + eps[0])
    step = _limited(gradient * ops.rsqrt(v), clip_threshold)
    m = betas[0] * m + (1.0 - betas[0]) * step
    return m, (m, v)


def _came_matrix(gradient, betas, eps, clip_threshold, m, v_row, v_column, residual_row, residual_column):
    beta1, beta2, beta3 = betas
    square = gradient * gradient + eps[0]
    v_row = beta2 * v_row + (1.0 - beta2) * square.mean(-1)
    v_column = beta2 * v_column + (1.0 - beta2) * square.mean(-2)
    step = _limited(gradient * _inverse_root(v_row, v_column), clip_threshold)
    m = beta1 * m + (1.0 - beta1) * step
    residual = (step - m) * (step - m) + eps[1]
    residual_row = beta3 * residual_row + (1.0 - beta3) * residual.mean(-1)
    residual_column = beta3 * residual_column + (1.0 - beta3) * residual.mean(-2)
    return m * _inverse_root(residual_row, residual_column), (m, v_row, v_column, residual_row, residual_column)


def _limited(step, threshold):
    """`step` scaled down to a root mean square of `threshold`."""
    root_mean_square = ops.sqrt((step * step).mean())
    return step * (1.0 / ops.maximum(root_mean_square / threshold, ops.ones_like(root_mean_square)))


def _inverse_root(row, column):
    """1 / sqrt of the second moment that row (..., R) and column (..., C) means stand for: (..., R, C)."""
    row = ops.rsqrt(row / row.mean(-1, keep_dims=True))
    column = ops.rsqrt(column)
    if len(row.shape) == 1:
        return _outer(row.reshape(-1, 1), column.reshape(1, -1))
    return row.expand_dims(-1) * column.expand_dims(-2)

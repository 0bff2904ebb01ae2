"""AdamW, Lion and CAME as pure functions: (parameter, gradient, numbers, states) to their successors.

Each computes K tensors of one shape at once, (K, *shape), so that an NPU launches a few kernels for all blocks. What a
tensor becomes does not depend on the others beside it.

Libraries' optimisers write their parameters themselves. As functions they can leave an overflowed step out, and be
given to the ranks that own a tensor. mindone.trainers' CAME and torch.optim.AdamW are the references in the tests.
"""

from dataclasses import dataclass, field
from typing import Tuple

from mindspore import ops

from mindsigma.choices import OPTIMIZERS
from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import filled, fused, mean

_outer = ops.BatchMatMul()
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
        if self.name not in OPTIMIZERS:
            raise MindSigmaError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.name!r}")
        betas, eps = OPTIMIZERS[self.name]
        for name, given, usual in (("betas", self.betas, betas), ("eps", self.eps, eps)):
            value = usual if given is None else tuple(given)
            if len(value) != len(usual):
                raise MindSigmaError(f"{name} of {self.name} are {len(usual)} numbers, not {value}")
            object.__setattr__(self, name, value)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise MindSigmaError(f"betas must lie in [0, 1), not {self.betas}")
        if not self.weight_decay >= 0:
            raise MindSigmaError(f"weight_decay must not be negative, not {self.weight_decay!r}")


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
    """What `update` takes of an OptimizerConfig, as constants of a graph: name, decays, eps, weight decay, threshold.

    A decay is a pair (beta, 1 - beta): a graph would compute the difference in fp32, 1.7e-4 off for 0.9999.
    """
    return config.name, decays(config), config.eps, float(config.weight_decay), float(config.clip_threshold)


def decays(config):
    """(beta, 1 - beta) of an OptimizerConfig's averages."""
    return tuple((float(beta), 1.0 - beta) for beta in config.betas)


def averaged(average, value, decay):
    """Moving average of a tensor; decay: a pair (beta, 1 - beta)."""
    return decay[0] * average + decay[1] * value


def itself(tensors):
    """`across` of what is not divided."""
    return tensors


def update(parameter, gradient, numbers, name, betas, eps, weight_decay, clip_threshold, states, across=itself):
    """One step of K tensors.

    Args:
        parameter, gradient: fp32 (K, *shape).
        numbers: NUMBERS fp32 scalars: learning rate, 1 - beta1^n and 1 - beta2^n after n updates, factor of the
            gradient.
        name, betas, eps, weight_decay, clip_threshold: constants of a graph, as `static_arguments` returns them; betas
            are pairs (beta, 1 - beta).
        states: tuple, as `state_shapes` lists them, each with K before its shape.
        across: function from a tuple of tensors to their means over the processes among which a matrix's rows are
            divided; `itself` where this process has all of them.

    Returns:
        the parameter and the tuple of the states after the step.
    """
    gradient = gradient * numbers[CLIP]
    rate = numbers[LEARNING_RATE]
    step, states = _step(gradient, numbers, name, betas, eps, clip_threshold, across, states)
    if weight_decay > 0:
        parameter = parameter * (1.0 - rate * weight_decay)
    return parameter - rate * step, states


def _step(gradient, numbers, name, betas, eps, clip_threshold, across, states):
    if name == "adamw":
        return _adamw(gradient, numbers, betas, eps, states)
    if name == "lion":
        return _lion(gradient, betas, states)
    if len(gradient.shape) < 3:
        return _came_vector(gradient, betas, eps, clip_threshold, states)
    return _came_matrix(gradient, betas, eps, clip_threshold, across, states)


def _adamw(gradient, numbers, betas, eps, states):
    m, v = states
    m, v = averaged(m, gradient, betas[0]), averaged(v, gradient * gradient, betas[1])
    root = ops.sqrt(v * (1.0 / numbers[CORRECTION_2])) + eps[0]
    corrected = m * (1.0 / numbers[CORRECTION_1])
    return corrected / root if fused() else _divide(corrected, root), (m, v)


def _lion(gradient, betas, states):
    m = states[0]
    return ops.sign(averaged(m, gradient, betas[0])), (averaged(m, gradient, betas[1]),)


def _came_vector(gradient, betas, eps, clip_threshold, states):
    m, v = states
    v = averaged(v, gradient * gradient + eps[0], betas[1])
    step = _limited(gradient * ops.rsqrt(v), clip_threshold, itself)
    m = averaged(m, step, betas[0])
    return m, (m, v)


def _came_matrix(gradient, betas, eps, clip_threshold, across, states):
    m, v_row, v_column, residual_row, residual_column = states
    square = gradient * gradient + eps[0]
    v_row, v_column, inverse_root = _factored(square, v_row, v_column, betas[1], across)
    step = _limited(gradient * inverse_root, clip_threshold, across)
    m = averaged(m, step, betas[0])
    residual = (step - m) * (step - m) + eps[1]
    residual_row, residual_column, inverse_root = _factored(residual, residual_row, residual_column, betas[2], across)
    return m * inverse_root, (m, v_row, v_column, residual_row, residual_column)


def _limited(step, threshold, across):
    """`step` (K, ...) with each of the K scaled down to a root mean square of `threshold`."""
    root_mean_square = ops.sqrt(across((mean(step * step, tuple(range(1, len(step.shape))), True),))[0])
    return step * (1.0 / ops.maximum(root_mean_square / threshold, filled((1,), 1.0, step.dtype)))


def _factored(square, row, column, decay, across):
    """Averages (..., R) and (..., C) of squares (..., R, C), moved on, and 1 / the root of the second moment that they
    stand for, (..., R, C).
    """
    row = averaged(row, mean(square, -1), decay)
    of_columns, of_row = across((mean(square, -2), mean(row, -1, True)))
    column = averaged(column, of_columns, decay)
    left, right = ops.expand_dims(ops.rsqrt(row / of_row), -1), ops.expand_dims(ops.rsqrt(column), -2)
    # On a CPU a product of matrices, as MindSpore's broadcast keeps index tables of four times the tensor's size.
    return row, column, left * right if fused() else _outer(left, right)

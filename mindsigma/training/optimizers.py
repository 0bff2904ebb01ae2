"""AdamW, Lion and CAME: from parameters, gradients and states to their successors, without writing any of them.

Each computes K tensors of one shape at once, (K, *shape), so that an NPU launches a few kernels for all blocks. What a
tensor becomes does not depend on the others beside it.

Libraries' optimisers write their parameters themselves. These hand new ones on, so that a step which overflowed can be
left out, and a tensor be given to the ranks that own it. mindone.trainers' CAME and torch.optim.AdamW are the
references in the tests.
"""

from dataclasses import dataclass, field
from typing import Tuple

import mindspore as ms
from mindspore import ops

from mindsigma.choices import OPTIMIZERS
from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import direct, filled, fused, lerp, mean

_outer = ops.BatchMatMul()
_times = ops.Mul()
_divide = ops.RealDiv()  # `/` keeps index tables on a CPU even where nothing is broadcast

# fp32 numbers that a step gives every update: learning rate, two corrections, factor of the gradient.
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


def decays(config):
    """(beta, 1 - beta) of an OptimizerConfig's averages."""
    return tuple((float(beta), 1.0 - beta) for beta in config.betas)


def optimizer_for(config, shape):
    """The Optimizer of an OptimizerConfig for tensors of a shape."""
    if config.name == "adamw":
        return AdamW(config)
    if config.name == "lion":
        return Lion(config)
    return CAME(config) if len(shape) > 1 else CAMEOfVectors(config)


def itself(tensors):
    """`across` of what is not divided."""
    return tensors


@ms.jit_class
class Optimizer:
    """How K tensors of one shape learn.

    What is known before is decided in Python and kept as an attribute. A graph that had to choose, or to take a number
    out of a tuple, would do so for each shape again, and take longer to compile.

    Args:
        config: OptimizerConfig.

    Attributes:
        first, second, third: 1 - beta, the part of a new value in each moving average. A graph would compute it in
            fp32, 1.7e-4 off for 0.9999.
        eps, residual_eps, decay, threshold: the constants of OptimizerConfig.
        lerp, mean: the operators of these names. outer: product of (..., R, 1) and (..., 1, C).
    """

    def __init__(self, config):
        self.first, self.second, self.third = (*(1.0 - beta for beta in config.betas), None)[:3]
        self.eps, self.residual_eps = (*config.eps, None, None)[:2]
        self.decay, self.threshold = float(config.weight_decay), float(config.clip_threshold)
        self.lerp, self.mean = direct(lerp), direct(mean)
        # On a CPU a product of matrices, as MindSpore's broadcast keeps index tables of four times the tensor's size.
        self.outer = _times if fused() else _outer

    def update(self, parameter, gradient, rate, corrections, states, across=itself):
        """One step of K tensors.

        Args:
            parameter, gradient: fp32 (K, *shape).
            rate: learning rate, fp32 (1,).
            corrections: 1 - beta1^n and 1 - beta2^n after n updates, fp32 (1,).
            states: tuple, as `state_shapes` lists them, each with K before its shape.
            across: function from a tuple of tensors to their means over the processes among which a matrix's rows are
                divided; `itself` where this process has all of them.

        Returns:
            the parameter and the tuple of the states after the step.
        """
        step, states = self.step(gradient, corrections, states, across)
        if self.decay > 0:
            parameter = parameter * (1.0 - rate * self.decay)
        return parameter - rate * step, states


@ms.jit_class
class AdamW(Optimizer):
    """arXiv 1711.05101."""

    def step(self, gradient, corrections, states, _):
        """The step before the learning rate, and the states after it."""
        m, v = states
        m = self.lerp(m, gradient, self.first)
        v = self.lerp(v, gradient * gradient, self.second)
        correction_1, correction_2 = corrections
        root = ops.sqrt(v * (1.0 / correction_2)) + self.eps
        corrected = m * (1.0 / correction_1)
        return corrected / root if fused() else _divide(corrected, root), (m, v)


@ms.jit_class
class Lion(Optimizer):
    """arXiv 2302.06675, algorithm 2."""

    def step(self, gradient, corrections, states, _):
        """The step before the learning rate, and the states after it."""
        (m,) = states
        return ops.sign(self.lerp(m, gradient, self.first)), (self.lerp(m, gradient, self.second),)


@ms.jit_class
class CAME(Optimizer):
    """arXiv 2307.02047, algorithm 2, over the last two axes."""

    def step(self, gradient, corrections, states, across):
        """The step before the learning rate, and the states after it."""
        m, v_row, v_column, residual_row, residual_column = states
        square = gradient * gradient + self.eps
        v_row, v_column, inverse_root = self.factored(square, v_row, v_column, self.second, across)
        step = self.limited(gradient * inverse_root, across)
        m = self.lerp(m, step, self.first)
        change = step - m
        residual = change * change + self.residual_eps
        residual_row, residual_column, inverse_root = self.factored(
            residual, residual_row, residual_column, self.third, across
        )
        return m * inverse_root, (m, v_row, v_column, residual_row, residual_column)

    def limited(self, step, across):
        """`step` (K, ...) with each of the K scaled down to a root mean square of the threshold."""
        (mean_square,) = across((self.mean(step * step, tuple(range(1, len(step.shape))), True),))
        root_mean_square = ops.sqrt(mean_square)
        return step * (1.0 / ops.maximum(root_mean_square / self.threshold, filled((1,), 1.0, step.dtype)))

    def factored(self, square, row, column, part, across):
        """Averages (..., R) and (..., C) of squares (..., R, C), moved on, and 1 / the root of the second moment that
        they stand for, (..., R, C). `part`: of a new value in an average.
        """
        row = self.lerp(row, self.mean(square, -1, False), part)
        of_columns, of_row = across((self.mean(square, -2, False), self.mean(row, -1, True)))
        column = self.lerp(column, of_columns, part)
        left = ops.expand_dims(ops.rsqrt(row / of_row), -1)
        right = ops.expand_dims(ops.rsqrt(column), -2)
        return row, column, self.outer(left, right)


@ms.jit_class
class CAMEOfVectors(CAME):
    """CAME of biases, whose second moment has nothing to be factored into."""

    def step(self, gradient, corrections, states, across):
        """The step before the learning rate, and the states after it."""
        m, v = states
        v = self.lerp(v, gradient * gradient + self.eps, self.second)
        m = self.lerp(m, self.limited(gradient * ops.rsqrt(v), itself), self.first)
        return m, (m, v)

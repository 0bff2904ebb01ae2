"""One training step: loss, gradients, accumulation, mean over processes, clip by the global norm, optimiser, average.

One form for all: on Ascend the whole step is one graph, on a CPU the same code runs operation by operation.
"""

from dataclasses import dataclass
from itertools import groupby

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mindsigma.distributed import Collectives, Ranks
from mindsigma.errors import MindSigmaError
from mindsigma.training.distributed import owners
from mindsigma.training.loss import diffusion_loss, noisy_latents
from mindsigma.training.optimizers import OptimizerConfig, decays, state_shapes, static_arguments
from mindsigma.training.updates import CONTROLS, SCALE, square_sum, unscale_and_clip, update_average, update_tensor


@dataclass(frozen=True)
class StepConfig:
    """What a step does besides the loss and the optimiser.

    Attributes:
        accumulation: micro-batches whose gradients are averaged before one update.
        max_norm: the gradients are scaled down to this global norm; 0: never.
        ema_decay: of the moving average of the weights; 0: none is kept.
        loss_scale: the loss is multiplied by it before differentiation, the gradients divided; it halves at each
            overflow and doubles after `scale_window` steps without one. 0: off.
        zero: 1: the optimiser's states are divided among the processes (ZeRO stage 1); 0: each has all.
    """

    accumulation: int = 1
    max_norm: float = 0.01
    ema_decay: float = 0.0
    loss_scale: float = 0.0
    scale_window: int = 2000
    zero: int = 0

    def __post_init__(self):
        if self.accumulation < 1:
            raise MindSigmaError(f"accumulation must be at least 1, not {self.accumulation}")
        if not 0 <= self.ema_decay < 1:
            raise MindSigmaError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        if self.max_norm < 0 or self.loss_scale < 0 or self.scale_window < 1:
            raise MindSigmaError("max_norm and loss_scale must not be negative, scale_window at least 1")
        if self.zero not in (0, 1):
            raise MindSigmaError(f"zero must be 0 or 1, not {self.zero}: stages 2 and 3 are not offered")


class TrainingStep(nn.Cell):
    """Trains the `parameters` of a DiT.

    Args:
        dit: DiT in training mode, its parameters fp32.
        parameters: list of the Parameters that learn.
        optimizer: OptimizerConfig.
        config: StepConfig.
        ranks: Ranks.
    """

    def __init__(self, dit, parameters, optimizer=None, config=None, ranks=None):
        super().__init__(auto_prefix=False)
        self.dit, self.learn_sigma = dit, dit.config.learn_sigma
        self.config = config = config or StepConfig()
        self.optimizer = optimizer = optimizer or OptimizerConfig()
        self.ranks = ranks or Ranks()
        self.collectives = Collectives(self.ranks)
        owner = [0] * len(parameters)
        if config.zero:
            owner = owners([parameter.size for parameter in parameters], self.ranks.count)
        # What one process owns stands together, and in it the tensors of one shape: slices of the gradients, each of
        # which an optimiser may treat as one tensor.
        order = sorted(range(len(parameters)), key=lambda i: (owner[i], tuple(parameters[i].shape), i))
        self.parameters = ParameterTuple([parameters[i] for i in order])
        owner = [owner[i] for i in order]
        self.shares = tuple(_range(owner, rank) for rank in range(self.ranks.count if config.zero else 1))
        begin, end = self.shares[self.ranks.rank if config.zero else 0]
        members = [list(same) for _, same in groupby(range(begin, end), lambda i: tuple(self.parameters[i].shape))]
        self.groups = tuple(Group(optimizer, self.parameters, same[0], same[-1] + 1) for same in members)
        self.ema = ParameterTuple([_copy(p, f"{p.name}:ema") for p in self.parameters] if config.ema_decay > 0 else [])
        # Of the micro-batches so far.
        summed = self.parameters if config.accumulation > 1 else ()
        self.sums = ParameterTuple([_zeros(f"{parameter.name}:sum", parameter.shape) for parameter in summed])
        start = np.zeros(CONTROLS, np.float32)
        start[SCALE] = config.loss_scale or 1.0
        self.controls = Parameter(Tensor(start), name="controls", requires_grad=False)
        self.betas = (*decays(optimizer), (0.0, 1.0))[:2]
        self.ema_decay = (config.ema_decay, 1.0 - config.ema_decay)
        self.constants = static_arguments(optimizer)
        self.map = ops.HyperMap()
        self.begins, self.ends = tuple(g.begin for g in self.groups), tuple(g.end for g in self.groups)
        self.group_parameters = tuple(group.parameters for group in self.groups)
        self.group_states = tuple(group.states for group in self.groups)
        self.states = ParameterTuple([state for group in self.groups for column in group.states for state in column])
        self.differentiate = ms.value_and_grad(self.loss, None, self.parameters, True)

    def own_states(self):
        """dict name -> Parameter of what this process keeps between steps, besides weights and averages."""
        return {"controls": self.controls, **{state.name: state for state in self.states}}

    def averages(self):
        """dict name -> Parameter of the moving averages, under the weights' names; empty if none are kept."""
        return {mean.name[: -len(":ema")]: mean for mean in self.ema}

    def loss(self, clean, noise, numbers, timestep, states, mask, scale, image_size=None, aspect_ratio=None):
        """Loss times scale (1,), squared error and bound, scalars, of one micro-batch of `construct`'s inputs."""
        noisy = noisy_latents(clean, noise, numbers)
        output = self.dit(noisy, timestep, states, mask, image_size, aspect_ratio)
        mse, bound = diffusion_loss(output, clean, noisy, noise, numbers, self.learn_sigma)
        mse, bound = mse.mean(), bound.mean()
        return (mse + bound) * scale[0], mse, bound

    def construct(self, clean, noise, numbers, timestep, states, mask, rate, last, image_size=None, aspect_ratio=None):
        """A micro-batch; with `last` the update follows.

        Args:
            clean, noise: (N, c, h, w) fp32, scaled latents and standard normal noise.
            numbers: fp32 (N, len(COLUMNS)), of training/loss.py, for the timesteps.
            timestep: fp32 (N,), 0 ... 999.
            states, mask: caption (N, L, d) and (N, L).
            rate: fp32 (1,), learning rate.
            last: bool, whether this is the last micro-batch before an update.
            image_size, aspect_ratio: micro conditions, or None.

        Returns:
            squared error and bound, fp32 scalars; norm of the gradient and finite, fp32 (1,), 0 and 1 unless `last`.
        """
        scale = self.controls[SCALE : SCALE + 1]
        (_, mse, bound), gradients = self.differentiate(
            clean, noise, numbers, timestep, states, mask, scale, image_size, aspect_ratio
        )
        if self.config.accumulation > 1:
            gradients = self.map(ops.add, self.sums, gradients)
            if not last:
                self.map(ops.assign, self.sums, gradients)
                return mse, bound, ops.zeros((1,), ms.float32), ops.ones((1,), ms.float32)
            self.map(ops.assign, self.sums, self.map(ops.zeros_like, self.sums))
        gradients = self.collectives.mean(gradients)
        values, norm, finite = self.scale_and_norm(self.square_sums(gradients), rate)
        self.update(values, finite, gradients)
        if self.config.ema_decay > 0:
            self.update_averages(finite)
        return mse, bound, norm, finite

    def square_sums(self, gradients):
        """Squared norms of the gradients, fp32 (K,)."""
        return ops.concat(self.map(square_sum, gradients))

    def scale_and_norm(self, squares, rate):
        """Numbers of the update, norm and finite, fp32 (1,), from squared norms and rate; moves the controls on."""
        config = self.config
        values, norm, finite, controls = unscale_and_clip(
            squares,
            self.controls,
            rate,
            config.max_norm,
            config.loss_scale > 0,
            config.scale_window,
            config.accumulation,
            self.betas,
        )
        ops.assign(self.controls, controls)
        return values, norm, finite

    def update(self, values, finite, gradients):
        """The optimiser, unless a gradient was not finite; then every process gets the others' weights."""
        for k in range(len(self.begins)):
            part = gradients[self.begins[k] : self.ends[k]]
            self.update_group(values, finite, self.group_parameters[k], part, self.group_states[k])
        if not self.collectives.alone and self.config.zero:
            for rank in range(len(self.shares)):
                mine = self.parameters[self.shares[rank][0] : self.shares[rank][1]]
                self.map(ops.assign, mine, self.collectives.from_rank(rank, mine))

    def update_group(self, values, finite, parameters, gradients, states):
        """The optimiser of tensors of one shape; states: a tuple of tensors for each state."""
        name, betas, eps, weight_decay, clip_threshold = self.constants
        one = ops.partial(update_tensor, name, betas, eps, weight_decay, clip_threshold, values, finite)
        # Written out: a graph does not unpack a tuple of tuples of Parameters into arguments.
        if len(states) == 1:
            return self.map(one, parameters, gradients, states[0])
        if len(states) == 2:
            return self.map(one, parameters, gradients, states[0], states[1])
        return self.map(one, parameters, gradients, states[0], states[1], states[2], states[3], states[4])

    def update_averages(self, finite):
        """Moving averages of the weights, unless a gradient was not finite."""
        self.map(ops.partial(update_average, finite, self.ema_decay), self.ema, self.parameters)

    def run(self, micro_batches, rate):
        """A whole step from Python.

        Args:
            micro_batches: list of tuples of `construct`'s inputs up to `mask`, with micro conditions at the end if the
                model has them; their number is the accumulation.
            rate: learning rate.

        Returns:
            squared error and bound, means over the micro-batches, norm of the gradient, and whether it was finite.
        """
        results = []
        rate = Tensor([rate], ms.float32)
        for i, inputs in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            results.append(self(*inputs[:6], rate, last, *inputs[6:]))
        mse, bound = (float(np.mean([float(result[i].asnumpy()) for result in results])) for i in (0, 1))
        norm, finite = (float(value.asnumpy()[0]) for value in results[-1][2:])
        return mse, bound, norm, finite > 0.5


class Group:
    """Parameters begin ... end, which have one shape, and their states: one tuple for each state."""

    def __init__(self, optimizer, parameters, begin, end):
        self.begin, self.end = begin, end
        self.parameters = ParameterTuple(parameters[begin:end])
        shapes = state_shapes(optimizer, parameters[begin].shape)
        self.states = tuple(
            ParameterTuple([_zeros(f"{parameter.name}:{state}", shape) for parameter in self.parameters])
            for state, shape in shapes.items()
        )


def _range(values, wanted):
    """(begin, end) of the elements of a sorted list that equal `wanted`."""
    begin = values.index(wanted) if wanted in values else 0
    return begin, begin + values.count(wanted)


def _zeros(name, shape):
    return Parameter(Tensor(np.zeros(shape, np.float32)), name=name, requires_grad=False)


def _copy(parameter, name):
    return Parameter(Tensor(parameter.asnumpy()), name=name, requires_grad=False)

"""One training step: loss, gradients, accumulation, mean over processes, clip by the global norm, optimiser, average.

In graph mode the whole step is one graph. In PyNative, on a CPU, it is a chain of small compiled graphs, as in
inference (ops/shared_graph.py); both run the functions of updates.py.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mindsigma.diffusion.loss import noisy_latents
from mindsigma.distributed import Collectives, Ranks, set_from_rank
from mindsigma.errors import MindSigmaError
from mindsigma.ops.gradients import value_and_gradients
from mindsigma.ops.native import direct
from mindsigma.ops.shared_graph import SharedGraph
from mindsigma.training.distributed import owners
from mindsigma.training.optimizers import OptimizerConfig, adamw_in_place, state_shapes, static_arguments
from mindsigma.training.updates import (
    CONTROLS,
    SCALE,
    add,
    averages,
    judge,
    loss_of_output,
    square_sum,
    square_sums,
    sums,
    update_average,
    update_tensor,
    updates,
)


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


def _range(values, wanted):
    """(begin, end) of the elements of a sorted list that equal `wanted`."""
    return values.index(wanted) if wanted in values else 0, (
        len(values) - values[::-1].index(wanted) if wanted in values else 0
    )


def _block_of(name):
    """Number of the block that a parameter belongs to, -1 for none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else -1


def _runs(values):
    """(begin, end) of each run of equal elements."""
    edges = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return list(zip(edges, edges[1:] + [len(values)]))


class _Group:
    """Parameters begin ... end, which have equally many states, and these: one tuple for each state."""

    def __init__(self, parameters, shapes, begin, end):
        self.begin, self.end = begin, end
        self.parameters = ParameterTuple(parameters[begin:end])
        names = [list(shapes[i]) for i in range(begin, end)]
        self.states = tuple(
            ParameterTuple(
                [
                    _zeros(f"{parameters[i].name}:{name[k]}", shapes[i][name[k]])
                    for i, name in zip(range(begin, end), names)
                ]
            )
            for k in range(len(names[0]))
        )


def _zeros(name, shape):
    return Parameter(Tensor(np.zeros(shape, np.float32)), name=name, requires_grad=False)


def _copy(parameter, name):
    return Parameter(Tensor(parameter.asnumpy()), name=name, requires_grad=False)


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
        self.dit = dit
        self.config = config = config or StepConfig()
        optimizer = optimizer or OptimizerConfig()
        self.ranks = ranks or Ranks()
        self.collectives = Collectives(self.ranks)
        self.learn_sigma = dit.config.learn_sigma
        states = [state_shapes(optimizer, parameter.shape) for parameter in parameters]
        sizes = [parameter.size for parameter in parameters]
        owner = owners(sizes, self.ranks.count) if config.zero else [0] * len(sizes)
        # What one process owns, and what has the same number of states, stands together: slices of the gradients.
        order = sorted(range(len(sizes)), key=lambda i: (owner[i], len(states[i]), i))
        self.parameters = ParameterTuple([parameters[i] for i in order])
        owner, states = [owner[i] for i in order], [states[i] for i in order]
        self.shares = tuple(_range(owner, rank) for rank in range(self.ranks.count if config.zero else 1))
        own = self.shares[self.ranks.rank if config.zero else 0]
        self.groups = tuple(
            _Group(self.parameters, states, own[0] + begin, own[0] + end)
            for begin, end in _runs([len(shapes) for shapes in states[own[0] : own[1]]])
        )
        marks = [(owner[i], len(states[i]), _block_of(self.parameters[i].name)) for i in range(len(states))]
        self.chunks = _runs(marks)
        self.ema = ParameterTuple([_copy(p, f"{p.name}:ema") for p in self.parameters] if config.ema_decay > 0 else [])
        # Of the micro-batches so far, between two calls of the graph; a chain has them at hand.
        summed = config.accumulation > 1 and ms.get_context("mode") == ms.GRAPH_MODE
        self.sums = ParameterTuple([_zeros(f"{p.name}:sum", p.shape) for p in self.parameters] if summed else [])
        start = np.zeros(CONTROLS, np.float32)
        start[SCALE] = config.loss_scale or 1.0
        self.controls = Parameter(Tensor(start), name="controls", requires_grad=False)

        self.add_noise = SharedGraph(noisy_latents)
        self.loss_of_output = SharedGraph(loss_of_output, static=(self.learn_sigma,))
        self.square_sums, self.sum = SharedGraph(square_sums), SharedGraph(sums)
        self.averages_of, self.updates = SharedGraph(averages), SharedGraph(updates)
        beta1, beta2 = (tuple(optimizer.betas) + (0.0, 0.0))[:2]
        self.judge = SharedGraph(
            judge,
            static=(config.max_norm, config.loss_scale > 0, config.scale_window, config.accumulation, beta1, beta2),
        )
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
        """Scaled loss, squared error and bound of one micro-batch; see `construct`."""
        noisy = self.add_noise(clean, noise, numbers)
        output = self.dit(noisy, timestep, states, mask, image_size, aspect_ratio)
        return self.loss_of_output(output, clean, noisy, noise, numbers, scale)

    def construct(self, clean, noise, numbers, timestep, states, mask, rate, last, image_size=None, aspect_ratio=None):
        """A micro-batch as one graph; with `last` the update follows.

        Args:
            clean, noise: (N, c, h, w) fp32, scaled latents and standard normal noise.
            numbers: fp32 (N, len(COLUMNS)), of diffusion/loss.py, for the timesteps.
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
            gradients = self.map(add, self.sums, gradients)
            if not last:
                self.map(ops.assign, self.sums, gradients)
                return mse, bound, ops.zeros((1,), ms.float32), ops.ones((1,), ms.float32)
            self.map(ops.assign, self.sums, self.map(ops.zeros_like, self.sums))
        gradients = self.collectives.mean(gradients)
        squares = self.map(square_sum, gradients)
        values, norm, finite, controls = self.judge(ops.concat(squares), self.controls, rate)
        ops.assign(self.controls, controls)
        for k in range(len(self.begins)):
            part = gradients[self.begins[k] : self.ends[k]]
            self._update_group(values, finite, self.group_parameters[k], part, self.group_states[k])
        if not self.collectives.alone and self.config.zero:
            for rank in range(len(self.shares)):
                mine = self.parameters[self.shares[rank][0] : self.shares[rank][1]]
                self.map(ops.assign, mine, self.collectives.from_rank(rank, mine))
        if self.config.ema_decay > 0:
            self.map(ops.partial(update_average, finite, self.config.ema_decay), self.ema, self.parameters)
        return mse, bound, norm, finite

    def _update_group(self, values, finite, parameters, gradients, states):
        name, betas, eps, weight_decay, clip_threshold = self.constants
        one = ops.partial(update_tensor, name, betas, eps, weight_decay, clip_threshold, values, finite)
        # Written out: a graph does not unpack a tuple of tuples of Parameters into arguments.
        if len(states) == 1:
            return self.map(one, parameters, gradients, states[0])
        if len(states) == 2:
            return self.map(one, parameters, gradients, states[0], states[1])
        return self.map(one, parameters, gradients, states[0], states[1], states[2], states[3], states[4])

    def run(self, micro_batches, rate):
        """A step in whatever way fits MindSpore's mode; arguments and result as of `chain`."""
        if ms.get_context("mode") != ms.GRAPH_MODE:
            return self.chain(micro_batches, rate)
        results = []
        rate = Tensor([rate], ms.float32)
        for i, inputs in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            results.append(self(*inputs[:6], rate, last, *inputs[6:]))
        mse, bound = (float(np.mean([float(result[i].asnumpy()) for result in results])) for i in (0, 1))
        norm, finite = (float(value.asnumpy()[0]) for value in results[-1][2:])
        return mse, bound, norm, finite > 0.5

    def chain(self, micro_batches, rate):
        """The whole step in PyNative, as a chain of small compiled graphs.

        Args:
            micro_batches: list of tuples of `construct`'s inputs up to `mask`, with micro conditions at the end if the
                model has them; their number is the accumulation.
            rate: learning rate.

        Returns:
            squared error and bound, means over the micro-batches, norm of the gradient, and whether it was finite.
        """
        scale = Tensor(self.controls.asnumpy()[SCALE : SCALE + 1])
        gradients, errors = None, []
        for inputs in micro_batches:
            inputs = inputs[:6] + (scale,) + inputs[6:]
            (_, mse, bound), new = value_and_gradients(self.loss, self.parameters, inputs)
            errors.append((mse, bound))
            if gradients is not None:
                new = [total for a, b in self.chunks for total in self.sum(b - a, *gradients[a:b], *new[a:b])]
            gradients = new
        gradients = self.collectives.mean(gradients)
        squares = self._square_sums(gradients)
        values, norm, finite, controls = self.judge(squares, Tensor(self.controls), Tensor([rate], ms.float32))
        self.controls.set_data(controls)
        if float(finite.asnumpy()[0]) > 0.5:
            self._chain_update(list(gradients), values)
        mse, bound = (float(np.mean([pair[i].asnumpy() for pair in errors])) for i in (0, 1))
        return mse, bound, float(norm.asnumpy()[0]), bool(finite.asnumpy()[0] > 0.5)

    def _square_sums(self, gradients):
        if direct.available():
            return Tensor(np.array([direct.sum_of_squares(gradient) for gradient in gradients], np.float32))
        return ops.concat([self.square_sums(*gradients[a:b]) for a, b in self.chunks])

    def _chain_update(self, gradients, values):
        name, betas, eps, weight_decay, _ = self.constants
        for group in self.groups:
            for a, b in [(a, b) for a, b in self.chunks if group.begin <= a and b <= group.end]:
                columns = [self.parameters[a:b]]
                columns += [column[a - group.begin : b - group.begin] for column in group.states]
                if name == "adamw":
                    adamw_in_place(values, betas, eps, weight_decay, columns[0], gradients[a:b], *columns[1:])
                    gradients[a:b] = [None] * (b - a)
                    continue
                tensors = [[Tensor(variable) for variable in column] for column in columns]
                flat = [tensor for column in (tensors[0], gradients[a:b], *tensors[1:]) for tensor in column]
                gradients[a:b] = [None] * (b - a)
                for variables, news in zip(zip(*columns), self.updates(b - a, *self.constants, values, *flat)):
                    for variable, new in zip(variables, news):
                        variable.set_data(new)
        if not self.collectives.alone and self.config.zero:
            for rank, (begin, end) in enumerate(self.shares):
                set_from_rank(rank, self.parameters[begin:end], self.collectives)
        if self.ema and direct.available():
            for mean, parameter in zip(self.ema, self.parameters):
                direct.update_average(mean, parameter, self.config.ema_decay)
        elif self.ema:
            for a, b in self.chunks:
                both = [Tensor(variable) for variable in (*self.ema[a:b], *self.parameters[a:b])]
                for mean, new in zip(self.ema[a:b], self.averages_of(b - a, self.config.ema_decay, *both)):
                    mean.set_data(new)

"""One training step: loss, gradients, accumulation, mean over processes, clip by the global norm, optimiser, average.

One form for all: on Ascend the whole step is one graph, on a CPU the same code runs operation by operation.
"""

from dataclasses import dataclass
from itertools import groupby

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mindsigma.choices import ZERO_STAGES
from mindsigma.distributed import Collectives, Ranks
from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import assign, direct, each, fused, lerp, split, stack
from mindsigma.training.loss import Denoising
from mindsigma.training.masters import forms_of, layout_of, to_network
from mindsigma.training.objective import Objective
from mindsigma.training.optimizers import (
    NUMBERS,
    OptimizerConfig,
    decays,
    optimizer_for,
    state_shapes,
)
from mindsigma.training.shares import Shares, Undivided, linear_weights
from mindsigma.training.updates import (
    CONTROLS,
    SCALE,
    assign_all,
    assign_if,
    emptied,
    if_finite,
    square_sum,
    unscale_and_clip,
)

LARGEST_GROUP = 1 << 27  # elements, 512 MB: what an update makes in between stays small beside the activations
LARGEST_SENT = 1 << 25  # elements, 128 MB, where processes share: while one group is sent, others are still computed


@dataclass(frozen=True)
class StepConfig:
    """What a step does besides the loss and the optimiser.

    Attributes:
        accumulation: micro-batches whose gradients are averaged before one update.
        max_norm: the gradients are scaled down to this global norm; 0: never.
        ema_decay: of the moving average of the weights; 0: none is kept.
        loss_scale: the loss is multiplied by it before differentiation, the gradients divided; it halves at each
            overflow and doubles after `scale_window` steps without one. 0: off.
        zero: what the processes divide (ZeRO, training/shares.py): 0 nothing, 1 the optimiser's states, 2 gradients,
            too, 3 weights, too, which takes `masters`.
        zero_group: processes that divide among themselves, while all such groups hold the same; 0: all of them.
        masters: the network's weights become those of its dtype, the step keeps them in fp32 (training/masters.py);
            else they are fp32 themselves, and cast where they are used.
    """

    accumulation: int = 1
    max_norm: float = 0.01
    ema_decay: float = 0.0
    loss_scale: float = 0.0
    scale_window: int = 2000
    zero: int = 0
    zero_group: int = 0
    masters: bool = False

    def __post_init__(self):
        if self.accumulation < 1:
            raise MindSigmaError(f"accumulation must be at least 1, not {self.accumulation}")
        if not 0 <= self.ema_decay < 1:
            raise MindSigmaError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        if self.max_norm < 0 or self.loss_scale < 0 or self.scale_window < 1:
            raise MindSigmaError("max_norm and loss_scale must not be negative, scale_window at least 1")
        if self.zero not in ZERO_STAGES:
            raise MindSigmaError(f"zero must be 0, 1, 2 or 3, not {self.zero}")


class TrainingStep(nn.Cell):
    """Trains the `parameters` of a DiT.

    Args:
        objective: Objective; or a DiT in training mode, which learns to denoise (loss.Denoising).
        parameters: list of the Parameters that learn, fp32.
        optimizer: OptimizerConfig.
        config: StepConfig.
        ranks: Ranks.
        largest: elements of all the tensors of one shape that are updated, and sent, as one. None: on Ascend, where a
            launch is what counts, LARGEST_GROUP or LARGEST_SENT; elsewhere 0, each tensor for itself, as a copy is what
            counts.
    """

    def __init__(self, objective, parameters, optimizer=None, config=None, ranks=None, largest=None):
        super().__init__(auto_prefix=False)
        self.objective = objective if isinstance(objective, Objective) else Denoising(objective)
        self.dit = self.objective.dit
        self.config = config = config or StepConfig()
        self.optimizer = optimizer = optimizer or OptimizerConfig()
        self.ranks = ranks or Ranks()
        self.collectives = Collectives(self.ranks)
        self.overlapped = fused() and not self.collectives.alone  # collectives run beside the backward pass
        self.shares = shares = Shares(config.zero, self.collectives, config.zero_group)
        if shares.stage == 3 and not (config.masters and fused()):
            raise MindSigmaError(
                "zero 3 divides weights that a whole network learns, on Ascend; use zero 2, or 1 with an adapter"
            )
        if largest is None:
            largest = (LARGEST_GROUP if self.collectives.alone else LARGEST_SENT) if fused() else 0
        dit = self.dit
        self.has_masters = masters = shares.stage == 3 or (config.masters and dit.dtype != ms.float32)
        forms = forms_of(dit, parameters, shares) if masters else ((),) * len(parameters)
        linear = linear_weights(dit) if shares.stage == 3 else {id(parameter) for parameter in parameters}
        divided = [id(parameter) in linear and shares.divides(parameter.shape) for parameter in parameters]
        keys = [(not divided[i], tuple(parameters[i].shape)) for i in range(len(parameters))]
        order = sorted(range(len(parameters)), key=lambda i: (keys[i], forms[i], i))
        self.parameters = ParameterTuple([parameters[i] for i in order])
        forms = [forms[i] for i in order]
        members = groups_of([keys[i] for i in order], largest)
        self.layouts = tuple(layout_of(forms[begin:end]) for begin, end in members)
        self.divided = tuple(divided[order[begin]] for begin, _ in members)
        # The backward pass comes to the last blocks first, so their gradients are sent first.
        firsts = [min(order[begin:end]) for begin, end in members]
        # At stage 3 the backward pass itself sends those of what is divided; the others follow.
        late = [shares.stage == 3 and not own for own in self.divided]
        self.sent = tuple(sorted(range(len(members)), key=lambda k: (late[k], -firsts[k])))
        self.places = tuple(self.sent.index(k) for k in range(len(members)))
        self.scatters = shares.scatters(len(members))
        # Of squared norms: each process of a group has its rows of what is divided, and all of the rest.
        self.counted = tuple(1.0 if own else 1.0 / shares.count for own in self.divided)
        averages = self.objective.averages
        self.own_averages = len(averages) == 0
        averages = [averages[i] for i in order] if averages else None
        self.groups = tuple(
            Group(
                optimizer,
                config,
                self.parameters[slice(*m)],
                shares if own else None,
                masters,
                averages and averages[slice(*m)],
            )
            for m, own in zip(members, self.divided)
        )
        self.dtype = dit.dtype if masters else ms.float32
        self.masters = ParameterTuple([master for group in self.groups for master in group.master])
        if masters:
            to_network(dit, self.parameters, shares)
        # A graph reads tuples of Parameters, not the attributes of a Group.
        self.group_parameters = tuple(group.parameters for group in self.groups)
        self.span_parameters = tuple(
            layout.of_spans(group.parameters) for group, layout in zip(self.groups, self.layouts)
        )
        self.group_states = tuple(group.states for group in self.groups)
        self.group_averages = tuple(group.averages for group in self.groups)
        self.begins, self.ends = tuple(begin for begin, _ in members), tuple(end for _, end in members)
        # What a graph may be exported with are the Parameters of a cell's own tuples.
        self.ema = ParameterTuple([average for group in self.groups for average in group.averages])
        self.sums = ParameterTuple([total for group in self.groups for total in group.total])  # of micro-batches so far
        self.states = ParameterTuple([state for group in self.groups for state in group.states])
        start = np.zeros(CONTROLS, np.float32)
        start[SCALE] = config.loss_scale or 1.0
        self.controls = Parameter(Tensor(start), name="controls", requires_grad=False)
        self.betas = (*decays(optimizer), (0.0, 1.0))[:2]
        # As a number from Python: a graph would compute the difference in fp32, 1.7e-4 off for 0.9999.
        self.averaging, self.averaged_part = config.ema_decay > 0, 1.0 - config.ema_decay
        self.rules = tuple(optimizer_for(optimizer, group.whole_shape) for group in self.groups)
        self.portions = tuple(shares if own else Undivided() for own in self.divided)
        self.map, self.write = ops.HyperMap(), direct(assign)
        self.differentiate = ms.value_and_grad(self.loss, None, self.parameters, True)

    def own_states(self):
        """dict name -> Parameter or Row of what is kept between steps, besides weights and averages."""
        rows = [row for group in self.groups for row in group.state_rows()]
        return {"controls": self.controls, **{row.name: row for row in rows}}

    def weights(self):
        """dict name -> Row of the master weights; empty if none are kept."""
        return {row.name: row for group in self.groups for row in group.master_rows()}

    def show(self, values):
        """Give the network weights, dict name -> Row or Tensor fp32; the masters stay as they are.

        With divided averages every process calls it.
        """
        for group, layout, pieces in zip(self.groups, self.layouts, self.span_parameters):
            for span, parameters in zip(layout.spans, pieces):
                for parameter in parameters:
                    if parameter.name in values:
                        whole = values[parameter.name].asnumpy()
                        own = self.shares.own_of(whole) if group.shares and self.shares.stage == 3 else whole
                        weight = span.used(ops.cast(Tensor(own).expand_dims(0), self.dtype))
                        parameter.set_data(weight.reshape(parameter.shape))

    def averages(self):
        """dict name -> Row of the moving averages, under the weights' names; empty if none are kept."""
        if self.config.ema_decay == 0:
            return {}
        return {name: row for group in self.groups for name, row in group.average_rows()}

    def sent_bytes(self):
        """Bytes that leave a process in one update, in rings: gradients and weights; without CAME's few statistics."""
        return sum(
            self.shares.sent_bytes(len(group.names) * int(np.prod(group.whole_shape)), own, self.dtype, self.config)
            for group, own in zip(self.groups, self.divided)
        )

    def loss(self, scale, *inputs):
        """Loss of a micro-batch times scale (1,), and what the objective gives, of which the loss is a sum."""
        found = self.objective(*inputs)
        total = found[0]
        for i in range(1, len(self.objective.terms)):
            total = total + found[i]
        return (total * scale.reshape(()),) + found

    def construct(self, rate, last, *inputs):
        """A micro-batch; with `last` the update follows.

        Args:
            rate: fp32 (1,), learning rate.
            last: bool, whether this is the last micro-batch before an update.
            inputs: tensors that the objective takes.

        Returns:
            what the objective gives; norm of the gradient and finite, fp32 (1,), 0 and 1 unless `last`.
        """
        controls = stack((self.controls,), 0).reshape(-1)  # split itself, a slow kernel would copy the Parameter first
        scale = split(controls, CONTROLS, 0)[SCALE]
        found, gradients = self.differentiate(scale, *inputs)
        found = found[1:]
        gradients = self.grouped(gradients)
        if self.shares.stage > 1:
            gradients = self.means(gradients)
        if self.config.accumulation > 1:
            gradients = self.map(ops.add, self.sums, gradients)
            if not last:
                written = self.map(assign, self.sums, gradients)
                return found + (ops.zeros((1,), ms.float32), ops.depend(ops.ones((1,), ms.float32), written))
            gradients = self.map(emptied, self.sums, gradients)
        if self.shares.stage < 2:
            gradients = self.means(gradients)
        values, norm, finite = self.scale_and_norm(self.square_norms(gradients), controls, rate)
        # In a graph for Ascend a write that nothing waits for is left out.
        return found + (norm, self.update(values, finite, gradients))

    def grouped(self, gradients):
        """Gradients of the tensors as gradients of the groups, (K, *shape) each, as they are sent.

        Where processes share, on Ascend, one is formed after the other, as they are sent. A collective follows what it
        sends at once, so all processes send in that order, and none waits for another collective, behind which
        MindSpore would put everything that is still to be computed (KernelGraph::SetExecOrderByDefault).
        """
        if not self.overlapped:
            return each(kept_of, self.layouts, each(ops.partial(tensors_of, gradients), self.begins, self.ends))
        formed, result = (), ()
        for k in self.sent:
            tensors = gradients[self.begins[k] : self.ends[k]]
            if len(formed) > 0:
                tensors = (ops.depend(tensors[0], formed[-1]),) + tensors[1:]
            gradient = self.layouts[k].kept(tensors)
            if self.shares.stage == 2 and self.divided[k]:
                gradient = self.shares.rows_of_each(gradient)
            formed += (gradient,)
        for place in self.places:
            result += (formed[place],)
        return result

    def means(self, gradients):
        """Means over the processes of the groups' gradients; from stage 2 on of this process's rows alone.

        On Ascend nothing is computed of a mean before the last is sent, so that the backward pass never waits for the
        links. Elsewhere each collective waits for the one before: all processes must send in one order.
        """
        if self.collectives.alone:
            return gradients
        share, sent, result = 1.0 / self.ranks.count, (), ()
        for k in self.sent:
            gradient, scattered = gradients[k], self.divided[k] and self.shares.stage == 2
            if not self.overlapped:
                gradient = self.shares.rows_of_each(gradient) if scattered else gradient
                gradient = ops.depend(gradient, sent[-1]) if len(sent) > 0 else gradient
            if scattered and len(self.scatters) > 0:
                gradient = self.shares.sum_of_groups(self.scatters[k](gradient))
            elif scattered:
                gradient = self.shares.sum_of_own(gradient)
            elif not self.divided[k] or self.shares.stage < 2:
                gradient = self.collectives.sum(gradient)
            else:  # at stage 3 the gradient of a gathered weight is a sum of the group already
                gradient = self.shares.sum_of_groups(gradient)
            sent += (gradient,)
        for k in range(len(self.places)):
            mean = ops.depend(sent[self.places[k]], sent[-1]) * share
            result += (mean.reshape(mean.shape[1:]) if self.divided[k] and self.shares.stage == 2 else mean,)
        return result

    def square_norms(self, gradients):
        """Squared norms of the groups' gradients, fp32, one number a group, the same on every process."""
        squares = self.square_sums(gradients)
        if self.shares.stage < 2:
            return squares
        return self.shares.inside.sum(squares * constant_row(self.counted))

    def square_sums(self, gradients):
        """Squared norms of what this process has of the groups' gradients, fp32, one number a group."""
        return ops.concat(self.map(square_sum, gradients))

    def scale_and_norm(self, squares, controls, rate):
        """Numbers of the update, norm and finite, fp32 (1,), from squared norms and rate; moves the controls on."""
        config = self.config
        values, norm, finite, controls = unscale_and_clip(
            squares,
            controls,
            rate,
            config.max_norm,
            config.loss_scale > 0,
            config.scale_window,
            config.accumulation,
            self.betas,
        )
        return ops.depend(values, assign(self.controls, controls)), norm, finite

    def update(self, values, finite, gradients):
        """Optimiser and averages, unless a gradient was not finite; every process gets the others' weights.

        Group by group, so that the new weights of one (K, *shape) are gone before the next. They are handed on, as a
        graph that read the Parameters again could get the old. Returns `finite`, which waits for all that.
        """
        rate, correction_1, correction_2, factor = split(values, NUMBERS, 0)
        corrections, is_finite, written = (correction_1, correction_2), finite > 0.5, finite
        for k in range(len(self.groups)):
            gradient = ops.depend(gradients[k], written)  # one after the other, not all at once
            done = self.update_group(rate, corrections, factor, is_finite, k, gradient)
            written = ops.depend(finite, done)
        return written

    def update_group(self, rate, corrections, factor, finite, k, gradient):
        """The optimiser and the average of the tensors of group k, of this process's rows if they are divided.

        Args:
            rate, corrections: of Optimizer.update.
            factor: fp32 (1,), of the gradient.
            finite: bool (1,); where it is false nothing changes.
            gradient: fp32 (K, *shape).

        Returns:
            what was written.
        """
        share = self.portions[k]
        states = self.group_states[k]
        old = self.own_weights(k)
        gradient = share.of_mean(gradient) * factor
        new, news = self.rules[k].update(old, gradient, rate, corrections, states, share.means)
        own = if_finite(finite, new, old)
        written = each(ops.partial(assign_if, self.write, finite), states, news)
        if self.has_masters:
            written = (written, self.write(self.masters[k], own))
        whole = share.in_network(own, self.dtype)
        pieces = self.layouts[k].used(whole, self.dtype)
        written = (written, each(ops.partial(assign_all, self.write), self.span_parameters[k], pieces))
        if self.averaging:
            written = (written, self.update_average(finite, k, own if self.own_averages else whole))
        return written

    def own_weights(self, k):
        """Weights of group k, fp32 (K, *shape), or this process's rows of them."""
        if self.has_masters:
            return self.masters[k]
        weights = stack(self.group_parameters[k], 0)
        return self.shares.own(weights) if self.divided[k] else weights

    def update_average(self, finite, k, weights):
        """Moving average of the weights of group k. Returns what was written."""
        places = self.group_averages[k]
        average = places[0] if self.own_averages else stack(places, 0)
        average = if_finite(finite, lerp(average, weights, self.averaged_part), average)
        return self.write(places[0], average) if self.own_averages else assign_all(self.write, places, average)

    def waited(self):
        """Seconds in collectives since the last call, where the step is not one graph; else 0."""
        return 0.0

    def run(self, micro_batches, rate):
        """A whole step from Python.

        Args:
            micro_batches: list of tuples of the objective's inputs; their number is the accumulation.
            rate: learning rate.

        Returns:
            the loss's terms, means over the micro-batches, norm of the gradient, and whether it was finite.
        """
        terms = len(self.objective.terms)
        rate, count = Tensor([rate], ms.float32), len(micro_batches)
        results = [self(rate, i + 1 == count, *inputs) for i, inputs in enumerate(micro_batches)]
        values = [float(np.mean([float(result[i].asnumpy()) for result in results])) for i in range(terms)]
        norm, finite = (float(value.asnumpy()[0]) for value in results[-1][-2:])
        return (*values, norm, finite > 0.5)


class Group:
    """Tensors of one shape that are updated as one, and what is kept for them, with their number K as first axis.

    Args:
        optimizer: OptimizerConfig.
        config: StepConfig.
        parameters: list of K Parameters of one shape.
        shares: Shares by which the processes divide them, or None: each keeps all.
        masters: whether to keep a copy of them, as they are now.
        averages: list of K Parameters that are to hold the moving averages, or None for one tensor (K, *shape) of its
            own.
    """

    def __init__(self, optimizer, config, parameters, shares=None, masters=False, averages=None):
        self.parameters, self.shares = ParameterTuple(parameters), shares
        self.names = [parameter.name for parameter in parameters]
        count, shape = len(parameters), tuple(parameters[0].shape)
        self.whole_shape = shape
        own = shares.shape(shape) if shares else shape
        self.shapes, self.whole_shapes = state_shapes(optimizer, own), state_shapes(optimizer, shape)
        self.states = ParameterTuple([self._parameter(name, (count, *each)) for name, each in self.shapes.items()])
        summed = own if config.zero > 1 else shape
        self.total = (self._parameter("sum", (count, *summed)),) if config.accumulation > 1 else ()
        self.master = (self._copy("master"),) if masters else ()
        self.averages, self.own_averages = (), averages is None
        if config.ema_decay > 0:
            self.averages = ParameterTuple([self._copy("ema")] if averages is None else averages)

    def _copy(self, what):
        weights = [parameter.asnumpy() for parameter in self.parameters]
        weights = np.stack([self.shares.own_of(array) for array in weights] if self.shares else weights)
        return self._parameter(what, weights.shape, weights)

    def _parameter(self, what, shape, values=None):
        values = np.zeros(shape, np.float32) if values is None else values
        return Parameter(Tensor(values), name=f"{self.names[0]}:{what}", requires_grad=False)

    def state_rows(self):
        """list of Row, the states of each tensor."""
        rows = []
        for state, values in zip(self.shapes, self.states):
            # What is of a column is not divided.
            shares = self.shares if self.shapes[state] != self.whole_shapes[state] else None
            rows += [Row(f"{name}:{state}", values, i, shares) for i, name in enumerate(self.names)]
        return rows

    def master_rows(self):
        """list of Row, the weights."""
        return [Row(name, master, i, self.shares) for master in self.master for i, name in enumerate(self.names)]

    def average_rows(self):
        """list of (name, Row or Parameter), the average of each tensor."""
        if not self.own_averages:
            return list(zip(self.names, self.averages))
        rows = [Row(name, average, i, self.shares) for average in self.averages for i, name in enumerate(self.names)]
        return [(row.name, row) for row in rows]


class Row:
    """One of the K tensors of a Parameter (K, *shape), to be read and set as a Parameter is.

    Args:
        name: of the tensor.
        stacked: the Parameter.
        index: which of the K.
        shares: Shares, if the Parameter holds this process's rows of the tensors, or None.

    Attributes:
        shape: of the whole tensor.
    """

    def __init__(self, name, stacked, index, shares=None):
        self.name, self.shares, self._stacked, self._index = name, shares, stacked, index
        shape = tuple(stacked.shape[1:])
        self.shape = (shape[0] * shares.count, *shape[1:]) if shares else shape

    def asnumpy(self):
        """Its values, float32. If it is divided, every process must call this."""
        own = self._stacked.asnumpy()[self._index]
        if not self.shares:
            return own
        gathered = self.shares.inside.gather(Tensor(own.reshape(len(own), -1)))
        return gathered.asnumpy().reshape(self.shape)

    def set_data(self, values):
        """Set its values from a whole Tensor."""
        own = self.shares.own_of(values.asnumpy()) if self.shares else values.asnumpy()
        if self._stacked.shape[0] == 1:
            self._stacked.set_data(Tensor(own).reshape(self._stacked.shape))
            return
        everything = self._stacked.asnumpy().copy()
        everything[self._index] = own
        self._stacked.set_data(Tensor(everything))


def tensors_of(gradients, begin, end):
    """Gradients of the tensors of a group, of those of all."""
    return gradients[begin:end]


def kept_of(layout, gradients):
    """Gradient of a group (K, *shape), of those of its tensors."""
    return layout.kept(gradients)


@ops.constexpr
def constant_row(values):
    """fp32 (n,) of n numbers, as a constant of the graph."""
    return Tensor(np.array(values, np.float32))


def groups_of(keys, largest):
    """list of (begin, end) of the Parameters of one key, of at most `largest` elements or one tensor.

    A key is a tuple whose last is the shape. Equal keys stand together.
    """
    result = []
    for key, same in groupby(range(len(keys)), lambda i: keys[i]):
        same = list(same)
        count = max(1, largest // max(1, int(np.prod(key[-1]))))
        result += [(i, min(i + count, same[-1] + 1)) for i in range(same[0], same[-1] + 1, count)]
    return result

"""How the processes of a run divide what a training step keeps (ZeRO, arXiv 1910.02054).

N processes divide a matrix (R, C) by its rows, where N divides R: process r has rows r R/N to (r + 1) R/N. All else,
biases, tables and convolutions, every process has whole. K matrices of one shape go into one collective.

| stage | divided | an update sends, for each number of a divided matrix |
|---|---|---|
| 1 | the optimiser's states, master weights, averages | AllReduce of the gradient, AllGather of the weight |
| 2 | gradients, too, after every micro-batch | ReduceScatter of the gradient, AllGather of the weight |
| 3 | weights, too | AllGather of the weight in both passes, ReduceScatter of the gradient |

At stage 3 a linear map gathers its weight where it uses it, and its gradient is scattered where it is made.

N may be fewer than all processes (arXiv 2304.11277, hybrid sharding): groups of N neighbours, such as the cards of a
server, divide among themselves, and all groups hold the same. Weights are then gathered within a group, and a process's
rows of a gradient are summed with those of the processes of its place in the other groups.
"""

import mindspore as ms
from mindspore import Tensor, ops

from mindsigma.models.linear import Linear
from mindsigma.ops.operators import narrow


@ms.jit_class
class Shares:
    """The shares of a run's processes.

    Args:
        stage: one of choices.ZERO_STAGES.
        collectives: Collectives of the run.
        group: processes that divide among themselves; 0: all. Raises MindSigmaError as Collectives.groups does.

    Attributes:
        stage: 0 where there is one process.
        rank, count: of this process in its group, and processes of a group.
        inside: Collectives of this group. across: those of the processes of this place in all groups.
    """

    def __init__(self, stage, collectives, group=0):
        self.collectives = collectives
        self.stage = 0 if collectives.alone else stage
        everyone = collectives.ranks.count
        self.inside, self.across = collectives.groups((self.stage and group) or everyone)
        self.rank, self.count = self.inside.ranks.rank, self.inside.ranks.count

    def divides(self, shape):
        """Whether a tensor of this shape is divided."""
        return self.stage > 0 and len(shape) == 2 and shape[0] % self.count == 0

    def shape(self, shape):
        """Shape of a process's rows of a divided tensor."""
        return (shape[0] // self.count, *shape[1:])

    def own(self, tensors):
        """This process's rows (K, R / N, ...) of K tensors (K, R, ...)."""
        rows = tensors.shape[1] // self.count
        return narrow(tensors, 1, self.rank * rows, rows)

    def own_of(self, array):
        """This process's rows of an ndarray (R, ...), a copy."""
        rows = len(array) // self.count
        return array[self.rank * rows : (self.rank + 1) * rows].copy()

    def whole(self, rows):
        """K tensors (K, R, C) of the processes' rows (K, R / N, C)."""
        count, length, columns = rows.shape
        gathered = self.inside.gather(rows)  # (N, K, R / N, C)
        return gathered.transpose(1, 0, 2, 3).reshape(count, self.count * length, columns)

    def rows_of_each(self, tensors):
        """The rows (N, K, R / N, C) of the processes of a group, of K tensors (K, R, C)."""
        count, rows, columns = tensors.shape
        return tensors.reshape(count, self.count, rows // self.count, columns).transpose(1, 0, 2, 3)

    def sum_of_own(self, rows_of_each):
        """This process's rows of the sum over its group of K tensors, given as `rows_of_each`: (1, K, R / N, C)."""
        return self.inside.sum_of_own(rows_of_each)

    def scatters(self, count):
        """So many operators for `sum_of_own`, each of which a sum over all groups follows; () where none does."""
        return () if self.stage != 2 or self.across.alone else self.inside.scatters(count)

    def sum_of_groups(self, rows):
        """The sum over all groups of this process's rows of their sums, (K, R / N, C) or (1, K, R / N, C)."""
        return self.across.sum(rows)

    def of_mean(self, gradient):
        """This process's rows of a mean of gradients (K, R, ...), which from stage 2 on are all that it has of it."""
        return self.own(gradient) if self.stage == 1 else gradient

    def in_network(self, rows, dtype):
        """What the network has of K tensors in its dtype: up to stage 2 all of them, else the rows that are given."""
        return self.whole(ops.cast(rows, dtype)) if self.stage < 3 else rows

    def means(self, tensors):
        """Means over the group of a tuple of tensors that each process has made of its rows."""
        return self.inside.mean(tensors)

    def sent_bytes(self, numbers, divided, dtype, config):
        """Bytes that leave a process in one update for the gradients and weights of so many numbers.

        A ring sends S (N - 1) / N bytes from each process to scatter sums or to gather tensors of S bytes in all, and
        twice that to sum them for all.

        Args:
            numbers: of the whole tensors.
            divided: whether they are.
            dtype: of the network's weights.
            config: StepConfig.
        """
        once, half = 4 * numbers, numbers * (4 if dtype == ms.float32 else 2)
        times = config.accumulation if self.stage > 1 else 1
        everyone, groups = self.collectives.ranks.count, self.across.ranks.count
        if not divided or self.stage < 2:
            sent = 2 * once * times * (everyone - 1) // everyone
            return sent + (half * (self.count - 1) // self.count if divided else 0)
        passes = 3 * half * times if self.stage == 3 else times * once + half
        among_groups = 2 * once * times // self.count * (groups - 1) // groups
        return passes * (self.count - 1) // self.count + among_groups


@ms.jit_class
class Undivided:
    """Stands for Shares where every process has all of a tensor."""

    def of_mean(self, gradient):
        """See Shares."""
        return gradient

    def in_network(self, tensors, dtype):
        """See Shares."""
        return tensors

    def means(self, tensors):
        """See Shares."""
        return tensors


class DividedLinear(Linear):
    """A Linear whose weight is this process's rows of it: stage 3."""

    def weights(self, dtype):
        """See Linear: the whole weight, gathered where it is used."""
        return self.gather(ops.cast(self.weight, dtype)), ops.cast(self.bias, dtype)


def divide_weights(network, shares):
    """Leave this process its rows of every Linear's fp32 weight that is divided."""
    for _, cell in network.cells_and_names():
        if isinstance(cell, Linear) and shares.divides(cell.weight.shape):
            cell.weight.set_data(Tensor(shares.own_of(cell.weight.asnumpy())), slice_shape=True)
            object.__setattr__(cell, "__class__", DividedLinear)
            cell.gather = shares.inside.recomputed_gather()


def linear_weights(network):
    """Set of the ids of the weights of the Linear cells."""
    return {id(cell.weight) for _, cell in network.cells_and_names() if isinstance(cell, Linear)}

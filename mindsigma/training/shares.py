"""How the processes of a run divide what a training step keeps (ZeRO, arXiv 1910.02054).

N processes divide a matrix (R, C) by its rows, where N divides R: process r has rows r R/N to (r + 1) R/N. All else,
biases, tables and convolutions, every process has whole. K matrices of one shape go into one collective.

| stage | divided | an update sends, for each number of a divided matrix |
|---|---|---|
| 1 | the optimiser's states, master weights, averages | AllReduce of the gradient, AllGather of the weight |
| 2 | gradients, too, after every micro-batch | ReduceScatter of the gradient, AllGather of the weight |
| 3 | weights, too | AllGather of the weight in both passes, ReduceScatter of the gradient |

At stage 3 a linear map gathers its weight where it uses it, and its gradient is scattered where it is made.
"""

import mindspore as ms
from mindspore import Tensor

from mindsigma.models.linear import Linear, cast
from mindsigma.ops.operators import narrow


class Shares:
    """The shares of a run's processes.

    Args:
        stage: one of choices.ZERO_STAGES.
        collectives: Collectives of the run.

    Attributes:
        stage: 0 where there is one process.
    """

    def __init__(self, stage, collectives):
        self.collectives = collectives
        self.rank, self.count = collectives.ranks.rank, collectives.ranks.count
        self.stage = 0 if collectives.alone else stage

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
        gathered = self.collectives.gather(rows)  # (N, K, R / N, C)
        return gathered.transpose(1, 0, 2, 3).reshape(count, self.count * length, columns)

    def sum_of_own(self, tensors):
        """This process's rows (K, R / N, C) of the sum over the processes of K tensors (K, R, C)."""
        count, rows, columns = tensors.shape
        rows_of_each = tensors.reshape(count, self.count, rows // self.count, columns).transpose(1, 0, 2, 3)
        return self.collectives.sum_of_own(rows_of_each)

    def means(self, tensors):
        """Means over the processes of a tuple of tensors that each has made of its rows."""
        return self.collectives.mean(tensors)

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
        if not divided or self.stage == 0:
            passes = 2 * once * times
        elif self.stage == 3:
            passes = 3 * half * times
        else:
            passes = (2 if self.stage == 1 else times) * once + half
        return passes * (self.count - 1) // self.count


class DividedLinear(Linear):
    """A Linear whose weight is this process's rows of it: stage 3."""

    def weights(self, dtype):
        """See Linear: the whole weight, gathered where it is used."""
        weight = self.gather(cast(self.weight, dtype))
        return weight, None if self.bias is None else cast(self.bias, dtype)


def divide_weights(network, shares):
    """Leave this process its rows of every Linear's fp32 weight that is divided."""
    for _, cell in network.cells_and_names():
        if isinstance(cell, Linear) and shares.divides(cell.weight.shape):
            cell.weight.set_data(Tensor(shares.own_of(cell.weight.asnumpy())), slice_shape=True)
            object.__setattr__(cell, "__class__", DividedLinear)
            cell.gather = shares.collectives.recomputed_gather()


def linear_weights(network):
    """Set of the ids of the weights of the Linear cells."""
    return {id(cell.weight) for _, cell in network.cells_and_names() if isinstance(cell, Linear)}

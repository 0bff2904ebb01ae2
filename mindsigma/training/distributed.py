"""Data parallelism under msrun: which process this is, and the three collectives that training needs.

MindSpore's CPU backend has AllReduce (sum of floats), AllGather and Broadcast over all processes, and nothing else, so
only these are used; on Ascend they are HCCL's.
"""

import os
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, ops

from mindsigma.errors import MindSigmaError


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one's number, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def first(self):
        """Whether this process is the one that writes and reports."""
        return self.rank == 0


def join_ranks():
    """Join the processes that msrun started, or be the only one. Call it before the first computation."""
    count = os.environ.get("MS_WORKER_NUM")
    if not count:
        return Ranks()
    from mindspore.communication import get_group_size, get_rank, init

    try:
        init()
    except (RuntimeError, ValueError) as error:
        raise MindSigmaError(
            f"the {count} processes of msrun did not find each other ({str(error).splitlines()[0]}); check its "
            "--master_addr and --master_port, and that all of them were started"
        ) from None
    return Ranks(get_rank(), get_group_size())


class Collectives:
    """Sums, gathers and broadcasts over all processes; with one process each gives its input back."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.alone = ranks.count == 1
        if not self.alone:
            self._sum = ops.AllReduce()
            self._broadcasts = tuple(ops.Broadcast(rank) for rank in range(ranks.count))

    def mean(self, tensors):
        """Tuple of the tensors' means over the processes; float tensors of any shape."""
        if self.alone:
            return tensors
        share = 1.0 / self.ranks.count
        result = ()
        for tensor in tensors:
            result += (self._sum(tensor) * share,)
        return result

    def total(self, values):
        """Sums over the processes of a few Python numbers, as a list of floats. Outside graphs; also a barrier."""
        if self.alone:
            return [float(value) for value in values]
        return self._sum(Tensor(np.asarray(values, np.float32))).asnumpy().tolist()

    def from_rank(self, rank, tensors):
        """Tuple of the tensors as process `rank` has them."""
        if self.alone:
            return tuple(tensors)
        broadcast = self._broadcasts[rank]
        result = ()
        for tensor in tensors:  # one by one: of a tuple, MindSpore's CPU backend sends the first tensor only
            result += (broadcast((tensor,))[0],)
        return result

    def barrier(self):
        """Wait for all processes."""
        self.total([0.0])


def set_from_rank(rank, parameters, collectives):
    """Give every process the Parameters of process `rank`, outside graphs."""
    if collectives.alone:
        return
    values = collectives.from_rank(rank, [Tensor(parameter) for parameter in parameters])
    for parameter, value in zip(parameters, values):
        parameter.set_data(value)


def owners(sizes, count):
    """Process that owns each of the tensors of `sizes` elements, so that all own about the same number of elements."""
    loads, result = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        result[i] = loads.index(min(loads))
        loads[result[i]] += sizes[i]
    return result

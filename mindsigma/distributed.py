"""Several processes under msrun: which one this is, and the collectives that training and sampling need.

MindSpore's CPU backend has AllReduce (sum of floats), AllGather and Broadcast over all processes, and nothing else. On
Ascend they are HCCL's, and so are ReduceScatter, for which a CPU sums everything and keeps its part, and groups of
some of the processes, for which a CPU has nothing.
"""

import os
from dataclasses import dataclass
from functools import cache

import numpy as np
from mindspore import Tensor, ops

from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import fused

ARRAY_DTYPES = (np.float32, np.int32)  # that `Collectives.array_from_rank` sends


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one's number, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def first(self):
        """Whether this process is the one that writes and reports."""
        return self.rank == 0


@cache
def join_ranks():
    """Join the processes that msrun started, or be the only one. Call it before the first computation."""
    count = os.environ.get("MS_WORKER_NUM")
    if not count:
        return Ranks()
    from mindspore.communication import get_group_size, get_rank, init

    # On a CPU the processes share one host's cores; threads of all on each of them would wait for each other.
    os.environ.setdefault("MINDSIGMA_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(count))))
    try:
        init()
    except (RuntimeError, ValueError) as error:
        raise MindSigmaError(
            f"the {count} processes of msrun did not find each other ({str(error).splitlines()[0]}); check its "
            "--master_addr and --master_port, and that all of them were started"
        ) from None
    return Ranks(get_rank(), get_group_size())


class Collectives:
    """Sums, gathers and broadcasts over all processes; with one process each gives its input back.

    Args:
        ranks: Ranks.
        group: of keyword arguments of MindSpore's operators, the name of a group of processes, of which `ranks` tells;
            empty for all of them.
    """

    def __init__(self, ranks, **group):
        self.ranks, self._group = ranks, group
        self.alone = ranks.count == 1
        if not self.alone:
            self._sum = ops.AllReduce(**group)
            self._gather, self._scatter = self._sized(ops.AllGather(**group)), self._sized(ops.ReduceScatter(**group))
            self._broadcasts = tuple(ops.Broadcast(rank) for rank in range(ranks.count)) if not group else ()

    def groups(self, size):
        """Collectives of this process's group of `size` neighbours, and of the processes of its place in all groups.

        Every process must call it.

        Raises:
            MindSigmaError: the processes do not fall into such groups, or this is not Ascend.
        """
        rank, count = self.ranks.rank, self.ranks.count
        if size == count:
            return self, Collectives(Ranks())
        if size < 2 or count % size:
            raise MindSigmaError(f"{count} processes do not fall into groups of {size}; take a divisor, at least 2")
        if not fused():
            raise MindSigmaError("groups of processes are for Ascend: MindSpore's CPU backend has none")
        first, place = rank - rank % size, rank % size
        _make_group(f"inside-{size}-{first}", tuple(range(first, first + size)))
        _make_group(f"across-{size}-{place}", tuple(range(place, count, size)))
        return (
            Collectives(Ranks(place, size), group=f"inside-{size}-{first}"),
            Collectives(Ranks(rank // size, count // size), group=f"across-{size}-{place}"),
        )

    def _sized(self, collective):
        """The operator with the number of processes told, so that one can build, and export, the graph of many."""
        collective.rank_size = self.ranks.count
        collective.add_prim_attr("rank_size", self.ranks.count)
        return collective

    def recomputed_gather(self):
        """An operator that joins the tensors (n, ...) of all processes to (processes * n, ...).

        It does so again in the backward pass, so that its result is not kept. Its gradient is the sum of the process's
        own rows.
        """
        return self._sized(ops.AllGather(**self._group)).recompute()

    def mean(self, tensors):
        """Tuple of the tensors' means over the processes; float tensors of any shape."""
        if self.alone:
            return tensors
        share, result = 1.0 / self.ranks.count, ()
        for tensor in tensors:
            # Each waits for the one before: graphs of processes may differ, and MindSpore orders what is independent
            # as it likes, but all processes must send in one order.
            result += (self._sum(ops.depend(tensor, result[-1]) if len(result) > 0 else tensor) * share,)
        return result

    def sum(self, tensor):
        """The sum of the processes' float tensors."""
        return tensor if self.alone else self._sum(tensor)

    def sum_of_own(self, tensor):
        """This process's place (1, ...) of the first axis of the sum of float tensors (processes, ...)."""
        if self.alone:
            return tensor
        if fused():
            return self._scatter(tensor)
        return self._sum(tensor)[self.ranks.rank : self.ranks.rank + 1]

    def scatters(self, count):
        """Operators of `sum_of_own` for Ascend, so many, of which each may be followed by another collective.

        MindSpore puts off what follows a collective until nothing else is left to compute. What follows one with a
        number, its `fusion`, it launches with the next such one (ExecOrderBuilder::BuildByBFS); those of the same
        number would become one.
        """
        operators = tuple(self._sized(ops.ReduceScatter(**self._group)) for _ in range(count))
        return tuple(operator.add_prim_attr("fusion", 1 + i) for i, operator in enumerate(operators))

    def total(self, values):
        """Sums over the processes of a few Python numbers, as a list of floats. Outside graphs; also a barrier."""
        if self.alone:
            return [float(value) for value in values]
        return self._sum(Tensor(np.asarray(values, np.float32))).asnumpy().tolist()

    def gather(self, tensor):
        """The tensors of all processes, of one shape and dtype, on a new first axis: (processes, *tensor.shape)."""
        tensor = tensor.expand_dims(0)
        return tensor if self.alone else self._gather(tensor)

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

    def array_from_rank(self, rank, array):
        """ndarray of at most 8 axes as process `rank` has it; the others need not know its shape. Outside graphs."""
        if self.alone:
            return array
        mine = self.ranks.rank == rank
        shape = [array.ndim, *array.shape] if mine else []
        shape = [int(side) for side in self.total(shape + [0] * (9 - len(shape)))]
        kinds = [int(mine and array.dtype == kind) for kind in ARRAY_DTYPES]
        dtype = ARRAY_DTYPES[self.total(kinds).index(1.0)]
        value = array if mine else np.zeros(shape[1 : 1 + shape[0]], dtype)
        return self.from_rank(rank, [Tensor(value)])[0].asnumpy()

    def spread(self, function, items):
        """Results of function(item) for a list of items, in their order, each computed by one of the processes.

        Like `map`, a generator. All processes get all results: float32 ndarrays of one shape. Outside graphs.
        """
        count, shape = self.ranks.count, None
        for start in range(0, len(items), count):
            mine = start + self.ranks.rank
            result = None
            if mine < len(items):
                result = np.asarray(function(items[mine]), np.float32)
            if shape is None:  # a process without an item learns it from the first
                known = [result.ndim, *result.shape] if self.ranks.first else []
                known = [int(side) for side in self.total(known + [0] * (9 - len(known)))]
                shape = tuple(known[1 : 1 + known[0]])
            if result is None:
                result = np.zeros(shape, np.float32)
            gathered = self.gather(Tensor(result)).asnumpy()
            yield from gathered[: len(items) - start]


@cache
def _make_group(name, ranks):
    """Let MindSpore know of a group of processes; once, as several steps of a run have the same groups."""
    from mindspore.communication import create_group

    create_group(name, list(ranks))


def set_from_rank(rank, parameters, collectives):
    """Give every process the Parameters of process `rank`, outside graphs."""
    if collectives.alone:
        return
    values = collectives.from_rank(rank, [Tensor(parameter) for parameter in parameters])
    for parameter, value in zip(parameters, values):
        parameter.set_data(value)

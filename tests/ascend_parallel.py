"""One process of several under msrun: MindSpore's collectives on the Ascend host, in both modes, held to NumPy.

"same" is printed for each mode in which everything was. With the argument `killed` process 1 is killed at the end, when
all others wait for it.
"""

import os
import signal
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import create_group, get_group_size, get_rank, init


class Network(nn.Cell):
    """Calls an operator that has its attributes, as one graph."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def construct(self, x):
        return self.operator(x)


class Exchange(nn.Cell):
    """The even ranks send, the odd receive, then back."""

    def __init__(self, rank, shape):
        super().__init__()
        self.first = rank % 2 == 0
        self.send = ops.Send(sr_tag=0, dest_rank=rank ^ 1)
        self.receive = ops.Receive(sr_tag=0, src_rank=rank ^ 1, shape=shape, dtype=ms.float32)
        self.depend = ops.Depend()

    def construct(self, x):
        if self.first:
            sent = self.send(x)
            return self.receive(self.depend(x, sent))
        received = self.receive(x)
        return self.depend(received, self.send(self.depend(x, received)))


def numbers(rank, shape):
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32)


def check(name, found, expected):
    np.testing.assert_array_equal(found.asnumpy(), expected, name)


def collectives(size, rank):
    """Each collective in fp32 and in halves, over all ranks and over a group of the first two in reverse."""
    shape = (4 * size, 6)
    arrays = [numbers(i, shape) for i in range(size)]
    total = sum(arrays[1:], arrays[0])
    part = slice(4 * rank, 4 * rank + 4)

    def run(operator, given=arrays[rank]):
        return Network(operator)(Tensor(given))

    check("AllReduce", run(ops.AllReduce()), total)
    check("maximum", run(ops.AllReduce(ops.ReduceOp.MAX)), np.maximum.reduce(arrays))
    check("AllGather", run(ops.AllGather()), np.concatenate(arrays))
    check("ReduceScatter", run(ops.ReduceScatter()), total[part])
    check("AlltoAll", run(ops.AlltoAll(size, 0, 0)), np.concatenate([array[part] for array in arrays]))
    for root in range(size):
        check("Broadcast", Network(ops.Broadcast(root))((Tensor(arrays[rank]),))[0], arrays[root])
    if rank ^ 1 < size:
        check("Send and Receive", Exchange(rank, shape)(Tensor(arrays[rank])), arrays[rank ^ 1])

    for dtype in (np.float16, np.int32):
        held = [(8 * array).astype(dtype) for array in arrays]
        wide = sum(array.astype(np.float32) for array in held).astype(dtype)
        check(f"AllReduce of {dtype.__name__}", run(ops.AllReduce(), held[rank]), wide)
    rounded = [Tensor(array).astype(ms.bfloat16).astype(ms.float32).asnumpy() for array in arrays]
    found = Network(ops.AllReduce())(Tensor(arrays[rank]).astype(ms.bfloat16))
    expected = Tensor(sum(rounded[1:], rounded[0])).astype(ms.bfloat16).astype(ms.float32).asnumpy()
    check("AllReduce of bfloat16", found.astype(ms.float32), expected)

    if rank < 2:
        check("a group's AllGather", run(ops.AllGather("pair")), np.concatenate(arrays[:2]))
        check("a group's AllReduce", run(ops.AllReduce(group="pair")), arrays[0] + arrays[1])


def main():
    ms.set_device("Ascend")
    init()
    size, rank = get_group_size(), get_rank()
    if rank < 2:
        create_group("pair", [0, 1])
    for mode, name in ((ms.GRAPH_MODE, "graph"), (ms.PYNATIVE_MODE, "PyNative")):
        ms.set_context(mode=mode)
        collectives(size, rank)
        print(f"{name}: same", flush=True)
    if sys.argv[1:] == ["killed"]:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ops.AllReduce()(Tensor(numbers(rank, (2, 2)))).asnumpy()


if __name__ == "__main__":
    main()

"""One rank of several on the Ascend host's library, without MindSpore: calls HCCL and holds it to NumPy.

Arguments: the library, the root info, how many ranks, this rank, and what to do: `all`, whose results are written as
JSON, or the name of a function below.
"""

import ctypes
import json
import os
import signal
import sys
import time

import numpy as np

KINDS = {"int8": 0, "int16": 1, "int32": 2, "float16": 3, "float32": 4, "int64": 5, "uint64": 6, "uint8": 7,
         "uint16": 8, "uint32": 9, "float64": 10, "bfloat16": 11}  # fmt: skip
REDUCTIONS = {"sum": 0, "prod": 1, "max": 2, "min": 3}
REDUCED = ("int8", "int16", "int32", "int64", "float16", "float32", "bfloat16")
LARGE = 300_001  # items that need several chunks, and do not fill the last one
WORLD_SEED = 5


def from_bfloat(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat(array):
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def numbers(rank, size, dtype):
    """The array of any rank, which every rank can make: uint16 for bfloat16."""
    rng = np.random.default_rng([WORLD_SEED, rank, size])
    if dtype in ("float16", "float32", "float64"):
        return rng.standard_normal(size).astype(dtype)
    if dtype == "bfloat16":
        return to_bfloat(rng.standard_normal(size))
    return rng.integers(0 if dtype.startswith("u") else -3, 4, size).astype(dtype)


def empty(size, dtype):
    return np.full(size, 77, "uint16" if dtype == "bfloat16" else dtype)


def reduced(arrays, dtype, reduction):
    """In the order of the ranks, halves in float32 and rounded once."""
    function = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
    wide = [from_bfloat(array) if dtype == "bfloat16" else array for array in arrays]
    wide = [array.astype(np.float32) if dtype == "float16" else array for array in wide]
    total = wide[0]
    for array in wide[1:]:
        total = function(total, array)
    return to_bfloat(total) if dtype == "bfloat16" else total.astype(dtype)


class Failed(Exception):
    """HCCL's code and what it said."""


class Comm:
    """A communicator: functions by their names without Hccl, arrays as their addresses."""

    def __init__(self, library, handle):
        self.library, self.handle = library, handle

    def call(self, name, *arguments):
        given = [self._argument(argument) for argument in arguments]
        code = getattr(self.library, f"Hccl{name}")(*given, self.handle, None)
        if code:
            raise Failed(f"{code} {self.library.aclGetRecentErrMsg().decode()}")

    @staticmethod
    def _argument(argument):
        if isinstance(argument, np.ndarray):
            return ctypes.c_void_p(argument.ctypes.data)
        if isinstance(argument, int):
            return ctypes.c_uint64(argument)
        return ctypes.c_int(KINDS[argument] if argument in KINDS else REDUCTIONS[argument])

    def group(self, ranks, identity):
        """The communicator of some ranks, of which this one is one."""
        _, rank = size_and_rank(self)
        handle = ctypes.c_void_p()
        code = self.library.HcclCreateSubCommConfig(
            ctypes.byref(self.handle), ctypes.c_uint32(len(ranks)), (ctypes.c_uint32 * len(ranks))(*ranks),
            ctypes.c_uint64(identity), ctypes.c_uint32(ranks.index(rank)), None, ctypes.byref(handle)
        )  # fmt: skip
        assert code == 0, self.library.aclGetRecentErrMsg()
        return Comm(self.library, handle)


def size_and_rank(comm):
    size, rank = ctypes.c_uint32(), ctypes.c_uint32()
    assert comm.library.HcclGetRankSize(comm.handle, ctypes.byref(size)) == 0
    assert comm.library.HcclGetRankId(comm.handle, ctypes.byref(rank)) == 0
    return size.value, rank.value


def refused(comm, words, name, *arguments):
    try:
        comm.call(name, *arguments)
    except Failed as failure:
        assert words in str(failure), failure
        return str(failure)
    raise AssertionError(f"{name} was not refused")


# What is done under "all", by all ranks in this order.


def all_reduce(comm, size, rank):
    for dtype in REDUCED:
        for reduction in REDUCTIONS:
            if reduction == "prod" and dtype in ("int16", "bfloat16"):
                continue
            arrays = [numbers(i, 1001, dtype) for i in range(size)]
            out = empty(1001, dtype)
            comm.call("AllReduce", arrays[rank], out, 1001, dtype, reduction)
            np.testing.assert_array_equal(out, reduced(arrays, dtype, reduction), f"{dtype} {reduction}")


def all_reduce_large_in_place(comm, size, rank):
    for dtype in ("float32", "int64"):
        arrays = [numbers(i, LARGE, dtype) for i in range(size)]
        held = arrays[rank].copy()
        comm.call("AllReduce", held, held, LARGE, dtype, "sum")
        np.testing.assert_array_equal(held, reduced(arrays, dtype, "sum"))


def whole_numbers_wrap(comm, size, rank):
    held = np.full(3, 100, np.int8)
    comm.call("AllReduce", held, held, 3, "int8", "sum")
    assert (held == np.int64(100 * size).astype(np.int8)).all()


def reduce(comm, size, rank):
    for items in (5, LARGE):
        arrays = [numbers(i, items, "float32") for i in range(size)]
        out = empty(items, "float32")
        comm.call("Reduce", arrays[rank], out, items, "float32", "max", size - 1)
        expected = reduced(arrays, "float32", "max") if rank == size - 1 else empty(items, "float32")
        np.testing.assert_array_equal(out, expected)


def reduce_scatter(comm, size, rank):
    for dtype in REDUCED:
        for items in (33, LARGE) if dtype == "float32" else (33,):
            arrays = [numbers(i, size * items, dtype) for i in range(size)]
            out = empty(items, dtype)
            comm.call("ReduceScatter", arrays[rank], out, items, dtype, "sum")
            expected = reduced(arrays, dtype, "sum")[rank * items : (rank + 1) * items]
            np.testing.assert_array_equal(out, expected, dtype)


def all_gather(comm, size, rank):
    for dtype in KINDS:
        for items in (7, LARGE) if dtype in ("float32", "uint8") else (7,):
            arrays = [numbers(i, items, dtype) for i in range(size)]
            out = empty(size * items, dtype)
            comm.call("AllGather", arrays[rank], out, items, dtype)
            np.testing.assert_array_equal(out, np.concatenate(arrays), dtype)


def broadcast(comm, size, rank):
    for root in range(size):
        for dtype, items in (("float64", 3), ("bfloat16", 9), ("float32", LARGE)):
            held = numbers(root, items, dtype) if rank == root else empty(items, dtype)
            comm.call("Broadcast", held, items, dtype, root)
            np.testing.assert_array_equal(held, numbers(root, items, dtype))


def scatter(comm, size, rank):
    for items in (3, LARGE):
        whole, out = numbers(1, size * items, "float32"), empty(items, "float32")
        comm.call("Scatter", whole if rank == 1 else np.zeros(1, np.float32), out, items, "float32", 1)
        np.testing.assert_array_equal(out, whole.reshape(size, items)[rank])


def all_to_all(comm, size, rank):
    for items in (4, LARGE):
        arrays = [numbers(i, size * items, "float32").reshape(size, items) for i in range(size)]
        out = empty((size, items), "float32")
        comm.call("AlltoAll", arrays[rank], items, "float32", out, items, "float32")
        np.testing.assert_array_equal(out, np.stack([array[rank] for array in arrays]))


def amounts(size):
    """Items from rank i to rank j: some none, one of several chunks."""
    counts = np.add.outer(2 * np.arange(size), 3 * np.arange(size)).astype(np.uint64)
    counts[1, 0] = LARGE
    return counts


def all_to_all_v(comm, size, rank):
    counts = amounts(size)
    sent, received = counts[rank].copy(), counts[:, rank].copy()
    held, out = numbers(rank, int(sent.sum()) + size, "int32"), empty(int(received.sum()) + size, "int32")
    starts = [np.cumsum(part + 1) - part - 1 for part in (sent, received)]  # one item of room between parts
    comm.call("AlltoAllV", held, sent, starts[0], "int32", out, received, starts[1], "int32")
    expected = empty(out.size, "int32")
    for other in range(size):
        theirs, row = numbers(other, int(counts[other].sum()) + size, "int32"), counts[other]
        start, amount = int((row[:rank] + 1).sum()), int(row[rank])
        place = int(starts[1][other])
        expected[place : place + amount] = theirs[start : start + amount]
    np.testing.assert_array_equal(out, expected)


def all_to_all_vc(comm, size, rank):
    counts = amounts(size)
    held, out = numbers(rank, int(counts[rank].sum()), "float16"), empty(int(counts[:, rank].sum()), "float16")
    comm.call("AlltoAllVC", held, counts, "float16", out, "float16")
    parts = []
    for other in range(size):
        theirs, row = numbers(other, int(counts[other].sum()), "float16"), counts[other]
        start = int(row[:rank].sum())
        parts.append(theirs[start : start + int(row[rank])])
    np.testing.assert_array_equal(out, np.concatenate(parts))


def send_and_receive(comm, size, rank):
    """Around the ring; rank 0 sends first."""
    for items in (1, LARGE):
        held, out = numbers(rank, items, "float32"), empty(items, "float32")
        after, before = (rank + 1) % size, (rank - 1) % size
        if rank == 0:
            comm.call("Send", held, items, "float32", after)
        comm.call("Recv", out, items, "float32", before)
        if rank != 0:
            comm.call("Send", held, items, "float32", after)
        np.testing.assert_array_equal(out, numbers(before, items, "float32"))


class Item(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("count", ctypes.c_uint64),
                ("kind", ctypes.c_int), ("remote", ctypes.c_uint32)]  # fmt: skip


def batch(comm, size, rank):
    """To everyone, oneself too, twice, all sends first."""
    held = [numbers(rank, size * items, "float32").reshape(size, items) for items in (5, LARGE)]
    out = [np.zeros_like(array) for array in held]
    items = []
    for receives, arrays in enumerate((held, out)):
        for array in arrays:
            for other in range(size):
                items.append(Item(receives, array[other].ctypes.data, array.shape[1], KINDS["float32"], other))
    code = comm.library.HcclBatchSendRecv((Item * len(items))(*items), len(items), comm.handle, None)
    assert code == 0, comm.library.aclGetRecentErrMsg()
    for array in out:
        theirs = [numbers(i, array.size, "float32").reshape(array.shape)[rank] for i in range(size)]
        np.testing.assert_array_equal(array, np.stack(theirs))


def barrier(comm, size, rank):
    times = empty(size, "float64")
    time.sleep(0.1 * rank)
    came = np.array([time.monotonic()])
    comm.call("Barrier")
    left = np.array([time.monotonic()])
    comm.call("AllGather", came, times, 1, "float64")
    assert left[0] >= times.max()


def sub_groups(comm, size, rank):
    """Groups of some ranks in another order, beside each other and beside the world; twice of one number."""
    for _ in range(2):
        pair = comm.group([1, 0], 7) if rank < 2 else None
        single = comm.group([rank], 100 + rank)
        for group, ranks in ((pair, [1, 0]), (single, [rank]), (comm, list(range(size)))):
            if group is None:
                continue
            assert size_and_rank(group) == (len(ranks), ranks.index(rank))
            out = empty(len(ranks) * 3, "float32")
            group.call("AllGather", numbers(rank, 3, "float32"), out, 3, "float32")
            np.testing.assert_array_equal(out, np.concatenate([numbers(i, 3, "float32") for i in ranks]))
        for group in (pair, single):
            if group is not None:
                assert comm.library.HcclCommDestroy(group.handle) == 0
                refused(group, "6 HcclBarrier: a communicator that is not open", "Barrier")


def nothing_to_do(comm, size, rank):
    """Counts of zero wait for nobody."""
    none, other = np.zeros(0, np.float32), np.zeros(0, np.float32)
    if rank == 0:
        comm.call("AllReduce", none, none, 0, "float32", "sum")
        comm.call("Broadcast", none, 0, "float32", 0)
        comm.call("Send", none, 0, "float32", 1)
        comm.call("AlltoAll", none, 0, "float32", none, 0, "float32")
    zeros = np.zeros(size, np.uint64)
    comm.call("AlltoAllV", none, zeros, zeros, "float32", other, zeros, zeros, "float32")


def refusals(comm, size, rank):
    """What CANN's pages exclude, before anyone is waited for."""
    x, y = np.zeros(8, np.float64), np.zeros(8, np.float64)
    null = ctypes.c_void_p(None)
    refused(comm, "5 HcclAllReduce: sum of float64; CANN takes int8", "AllReduce", x, y, 4, "float64", "sum")
    refused(comm, "sum of uint8", "ReduceScatter", x, y, 4, "uint8", "sum")
    refused(comm, "5 HcclAllReduce: prod of bfloat16", "AllReduce", x, y, 4, "bfloat16", "prod")
    refused(comm, "prod of int16", "Reduce", x, y, 4, "int16", "prod", 0)
    refused(comm, "1 HcclBroadcast: root", "Broadcast", x, 4, "float32", size)
    refused(comm, "at most 34359738367", "AllGather", x, y, 1 << 35, "int8")
    refused(comm, "not aligned to 4 bytes", "AllGather", x.view(np.int8)[1:], y, 1, "float32")
    refused(comm, "a rank that waits for itself", "Send", x, 4, "float32", rank)
    refused(comm, "differs in count or data type", "AlltoAll", x, 1, "float32", y, 2, "float32")
    refused(comm, "sendBuf and recvBuf are one", "AlltoAll", x, 1, "float32", x, 1, "float32")
    assert comm.library.HcclAllReduce(null, null, ctypes.c_uint64(1), 4, 0, comm.handle, null) == 2
    assert comm.library.HcclAllReduce(null, null, ctypes.c_uint64(1), 99, 0, comm.handle, null) == 5
    assert comm.library.HcclBarrier(null, null) == 2
    comm.call("Barrier")


TOGETHER = (all_reduce, all_reduce_large_in_place, whole_numbers_wrap, reduce, reduce_scatter, all_gather, broadcast,
            scatter, all_to_all, all_to_all_v, all_to_all_vc, send_and_receive, batch, barrier, sub_groups,
            nothing_to_do, refusals)  # fmt: skip


# What ends a group.


def killed(comm, size, rank):
    """The last rank is killed; all others are told in the midst of a collective, and ever after."""
    x = np.zeros(3, np.float32)
    comm.call("AllReduce", x, x, 3, "float32", "sum")
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ended = f"rank {size - 1} ended while rank"  # and which of the others saw it first
    refused(comm, f"21 HcclAllReduce: {ended}", "AllReduce", x, x, 3, "float32", "sum")
    refused(comm, ended, "Barrier")
    error = ctypes.c_int()
    assert comm.library.HcclGetCommAsyncError(comm.handle, ctypes.byref(error)) == 0
    assert error.value == 21


def killed_sender(comm, size, rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        x = np.zeros(3, np.float32)
        refused(comm, "21 HcclRecv: rank 1 ended while rank 0 waited", "Recv", x, 3, "float32", 1)


def slow(comm, size, rank):
    """One rank lives and does not come."""
    x = np.zeros(3, np.float32)
    if rank == 0:
        time.sleep(1.7)
    refused(comm, "9 HcclAllReduce: rank 1 waited in HcclAllReduce longer than HCCL_EXEC_TIMEOUT (1 s)", "AllReduce",
            x, x, 3, "float32", "sum")  # fmt: skip


def disagreeing(comm, size, rank):
    x, y = np.zeros(8, np.float32), np.zeros(8, np.float32)
    words = "1 HcclAllReduce: ranks do not agree: rank 0 called HcclAllReduce(count 4, float32, sum, root 0), rank 1"
    refused(comm, words, "AllReduce", x, y, 4 + rank, "float32", "sum")


def different_collectives(comm, size, rank):
    x = np.zeros(8, np.float32)
    if rank:
        refused(comm, "rank 1 called HcclBroadcast(count 8, float32, root 0)", "Broadcast", x, 8, "float32", 0)
    else:
        refused(comm, "rank 1 called HcclBroadcast(count 8, float32, root 0)", "AllReduce", x, x, 8, "float32", "sum")


def unequal_parts(comm, size, rank):
    x, y, counts = np.zeros(9, np.float32), np.zeros(9, np.float32), np.ones(size, np.uint64)
    starts = np.arange(size, dtype=np.uint64)
    given = counts * 2 if rank == 1 else counts
    refused(comm, "rank 1 sends 8 bytes", "AlltoAllV", x, given, starts, "float32", y, counts, starts, "float32")


def unequal_messages(comm, size, rank):
    x = np.zeros(9, np.float32)
    if rank < 2:
        name, count = ("Send", 4) if rank == 0 else ("Recv", 5)
        words = "rank 0 sends 4 of float32, of which rank 1 receives 5 of float32"
        refused(comm, words, name, x, count, "float32", 1 - rank)


def both_send(comm, size, rank):
    x = np.zeros(9, np.float32)
    if rank < 2:
        refused(comm, "ranks 0 and 1 both send first", "Send", x, 9, "float32", 1 - rank)


def all_together(comm, size, rank):
    said = {}
    for function in TOGETHER:
        try:
            function(comm, size, rank)
            said[function.__name__] = None
        except (AssertionError, Failed) as error:
            said[function.__name__] = str(error)
    return said


def main():
    path, info, size, rank, what = sys.argv[1:6]
    library = ctypes.CDLL(path)
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    library.HcclGetErrorString.restype = ctypes.c_char_p
    handle = ctypes.c_void_p()
    name = ctypes.create_string_buffer(info.encode(), 4108)
    if os.path.isfile(info):
        code = library.HcclCommInitClusterInfo(info.encode(), ctypes.c_uint32(int(rank)), ctypes.byref(handle))
    else:
        code = library.HcclCommInitRootInfo(
            ctypes.c_uint32(int(size)), name, ctypes.c_uint32(int(rank)), ctypes.byref(handle)
        )
    if code:
        sys.exit(f"{code} {library.aclGetRecentErrMsg().decode()}")
    comm = Comm(library, handle)
    assert size_and_rank(comm) == (int(size), int(rank))
    if what == "all":
        print(json.dumps(all_together(comm, int(size), int(rank))))
    else:
        globals()[what](comm, int(size), int(rank))


if __name__ == "__main__":
    main()

"""Means of arrays over the processes of one host, through memory that they share.

MindSpore's AllReduce on a CPU goes through sockets. For the gradients of a step it takes several times as long.
"""

import mmap
import os
import platform
import time

import numpy as np

PLACE = "/dev/shm"  # noqa: S108, memory that processes share on Linux
FIRST_WAIT, LONGEST_WAIT = 5e-5, 2e-3  # seconds between two looks at the others, a third longer each time
LINE = 64  # bytes between the counters of two processes


class SharedMean:
    """Means of float32 arrays, in the order of the processes' numbers, so that all get the same bits.

    Args:
        collectives: Collectives of several processes; every process makes its SharedMean at the same time.
        numbers: of all arrays together.

    Attributes:
        works: whether all processes share memory; if not, nothing else is to be called.
    """

    def __init__(self, collectives, numbers):
        self._rank, self._count, self._numbers = collectives.ranks.rank, collectives.ranks.count, numbers
        self._round = 0
        token = int.from_bytes(os.urandom(3), "little")
        token = int(collectives.array_from_rank(0, np.array([token], np.int32))[0])
        path = f"{PLACE}/mindsigma-{os.getuid()}-{token}"
        head = LINE * self._count
        size = head + 4 * numbers * (self._count + 1)
        # Elsewhere a process could see that another has arrived before it sees what that one wrote.
        ordered = platform.machine() == "x86_64"
        memory = self._open(path, size, os.O_CREAT | os.O_EXCL) if ordered and self._rank == 0 else None
        collectives.barrier()
        if ordered and self._rank != 0:
            memory = self._open(path, size, 0)
        self.works = collectives.total([memory is None])[0] == 0
        if self._rank == 0 and os.path.exists(path):
            os.unlink(path)  # it lasts as long as a process holds it
        if self.works:
            self._arrived = np.frombuffer(memory, np.int64, head // 8).reshape(self._count, -1)[:, 0]
            values = np.frombuffer(memory, np.float32, offset=head).reshape(self._count + 1, numbers)
            self._given, self._mean = values[:-1], values[-1]

    @staticmethod
    def _open(path, size, more):
        """The memory of a file, or None."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | more, 0o600)
        except OSError:
            return None
        try:
            os.posix_fallocate(file, 0, size)  # what does not fit would end the process when it is written
            return mmap.mmap(file, size)
        except OSError:
            return None
        finally:
            os.close(file)

    def __call__(self, arrays):
        """list of the means of a list of float32 arrays, which are views of memory that the next call overwrites."""
        own, end = self._given[self._rank], 0
        for array in arrays:
            own[end : end + array.size] = array.reshape(-1)
            end += array.size
        self._meet()
        bounds = [end * i // self._count for i in range(self._count + 1)]
        mine = slice(bounds[self._rank], bounds[self._rank + 1])
        total = self._mean[mine]
        np.copyto(total, self._given[0, mine])
        for given in self._given[1:]:
            total += given[mine]
        total *= np.float32(1.0 / self._count)
        self._meet()
        result, end = [], 0
        for array in arrays:
            result.append(self._mean[end : end + array.size].reshape(array.shape))
            end += array.size
        return result

    def _meet(self):
        """Wait until all processes have come here."""
        self._round += 1
        self._arrived[self._rank] = self._round
        wait = FIRST_WAIT
        while self._arrived.min() < self._round:
            time.sleep(wait)
            wait = min(wait * 4 / 3, LONGEST_WAIT)

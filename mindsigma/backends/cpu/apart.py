"""Images of a batch that are computed apart, each share of them by a thread of its own.

Threads that share every loop meet at the end of each, ten times a block. Beside other busy processes one of them mostly
has no core just then, and the others wait. Threads with images of their own meet once a step. No result changes: what a
sum is made of does not depend on who computes it.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor, wait

from mindsigma.backends.cpu.library import library


def each_share(images, compute):
    """Call compute(first, last) for shares of images 0 ... images - 1, at once in threads, or for all of them.

    There is a share for each thread of the kernels, if there are images enough. Who has ended leaves its thread to the
    loops of the others. `compute` calls nothing of MindSpore that computes.
    """
    threads = library().threads()
    if threads == 1 or images < threads:
        compute(0, images)
        return
    bounds = [images * i // threads for i in range(threads + 1)]
    library().apart(threads)
    others = [_threads(threads - 1).submit(_share, compute, *bounds[i : i + 2]) for i in range(1, threads)]
    try:
        _share(compute, 0, bounds[1])
    finally:
        wait(others)
    for other in others:
        other.result()


def _share(compute, first, last):
    try:
        compute(first, last)
    finally:
        library().apart(-1)


@functools.cache
def _threads(count):
    return ThreadPoolExecutor(count, "mindsigma-images")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads

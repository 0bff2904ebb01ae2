"""A process that prepares one case and then runs it whenever it is told to; needs nothing beyond the standard library.

    python SCRIPT CASE OPTIONS.json

Standard output carries one JSON line for the preparation and one for every line `run` or `save PATH` on standard
input; what libraries print goes to standard error.
"""

import json
import os
import resource
import sys
import time


def serve(cases):
    """Answer until standard input ends.

    Args:
        cases: dict name -> function of the options (a dict) that returns a function without arguments; this is what is
            timed, and it returns a NumPy array or None.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**values):
        print(json.dumps(values), file=replies, flush=True)

    start = time.perf_counter()
    run = cases[sys.argv[1]](json.loads(sys.argv[2]))
    reply(seconds=time.perf_counter() - start, versions=versions())
    result = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "run":
            cpu, start = cpu_seconds(), time.perf_counter()
            result = run()
            seconds = time.perf_counter() - start
            reply(seconds=seconds, cpu_seconds=cpu_seconds() - cpu, peak_bytes=peak_bytes())
        elif command == "save":
            import numpy as np

            np.save(argument, result)
            reply(saved=argument)


def cpu_seconds():
    """Processor seconds that this process has used, over all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes():
    """Largest resident set of this process so far. (ru_maxrss would be the parent's where that was larger.)"""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def versions():
    """Versions of the frameworks that this process has loaded, and PyTorch's number of threads."""
    names = ("mindspore", "mindone", "torch", "diffusers", "transformers", "numpy")
    found = {name: getattr(sys.modules[name], "__version__", None) for name in names if name in sys.modules}
    if "torch" in sys.modules:
        found["torch_threads"] = sys.modules["torch"].get_num_threads()
    return {name: value for name, value in found.items() if value is not None}

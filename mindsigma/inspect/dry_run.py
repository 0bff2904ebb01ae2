"""One process of a dry run: builds the graph of a Request, calls it twice, writes what only it knows. See launches.py.

python -m mindsigma.inspect.dry_run '{"request": {...}, "cards": 1, "zero": 0, "zero_group": 0, "out": "plan.json"}'
"""

import json
import sys
import time
from pathlib import Path

import mindspore as ms

from mindsigma.distributed import Ranks
from mindsigma.inspect.parts import Request, build_part

MARKER = "the graph begins"
# A dry run has no virtual memory: its pool grows by pieces of 1 GB, and nothing fits across two. On a 910B the pool is
# one range of addresses, and so it is here.
ONE_RANGE = "64GB"
MIB = 1 << 20


def main():
    """Build, call, write."""
    given = json.loads(sys.argv[1])
    ms.set_device("Ascend")
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.runtime.set_memory(increase_size=ONE_RANGE)
    ranks = Ranks()
    if given["cards"] > 1:
        from mindspore.communication import get_group_size, get_rank, init

        init()
        ranks = Ranks(get_rank(), get_group_size())
    cell, request = build_part(Request(**given["request"]), ranks, given["zero"], given["zero_group"])
    cells = (cell, *cell.beside)
    bytes_of = {}
    for one in cells:
        for parameter in one.get_parameters():
            if parameter.has_init:
                parameter.init_data()
            bytes_of[parameter.name] = parameter.nbytes
    sys.stdout.write(f"{MARKER}\n")
    sys.stdout.flush()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for one in cells:
            one(*one.inputs)
        ms.runtime.synchronize()
        seconds.append(time.perf_counter() - start)
    network = sum(p.nbytes for p in getattr(cell.owner, "objective", cell.owner).get_parameters())
    sent = sum(one.owner.sent_bytes() for one in cells) if request.part == "train" else 0
    found = {
        "marker": MARKER,
        "weight_mb": network / MIB,
        "state_mb": (sum(bytes_of.values()) - network) / MIB,
        "compile_seconds": seconds[0],
        "dispatch_seconds": seconds[1],
        "sent_mb": sent / MIB,
    }
    Path(given["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

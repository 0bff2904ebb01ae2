"""A worker of tools/measure at no cost: its n-th run returns n times options["value"]; more than `most` are refused."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tools")]

import numpy as np  # noqa: E402
from measure.worker import serve  # noqa: E402


def prepare(options):
    """The run; both talk, which must not reach the protocol."""
    print("libraries talk")
    runs = []

    def run():
        runs.append(1)
        print("more talk")
        if len(runs) > options["most"]:
            sys.exit("too many runs")
        return np.full(3, options["value"] * len(runs))

    return run


if __name__ == "__main__":
    serve({"case": prepare})

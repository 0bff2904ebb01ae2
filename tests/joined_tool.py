"""A tool of several processes that only join, sum and end, as a launched tool does. Prints the sum of their numbers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mindsigma import command_line  # noqa: E402


def main():
    """Join, sum, end."""
    from mindsigma.distributed import Collectives, join_ranks
    from mindsigma.runtime import set_device

    set_device("CPU")
    ranks = join_ranks()
    print(Collectives(ranks).total([ranks.rank + 1.0]), flush=True)
    return 0


if __name__ == "__main__":
    command_line.run(main)

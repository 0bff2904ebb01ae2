"""A tool that says something; its argument is where: encoding, closed (nobody reads) or full (a full disk)."""

import os
import sys

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, say


def encoding():
    say("caf\u00e9 \ud800 \x1b[31m\n \u202e")
    print("\u00e9\udcff")
    raise MindSigmaError("\u00e9 \udcff")


def closed():
    say("x" * 1000)


def full():
    print("x")


if __name__ == "__main__":
    if sys.argv[1] == "closed":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
    if sys.argv[1] == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    command_line.run({"encoding": encoding, "closed": closed, "full": full}[sys.argv[1]])

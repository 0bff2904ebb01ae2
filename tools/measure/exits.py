"""Runs a command many times and counts how its processes end; exits 1 if one did not end with 0.

python tools/measure/exits.py --times 200 -- python tools/generate.py "a red apple" --steps 1 --out apple.png
"""

import argparse
import subprocess
import sys
from collections import Counter

from mindsigma import command_line

SHOWN = 2000  # characters of the output of a run that failed


def main():
    """Parse, run, print; returns the exit code."""
    parser = command_line.parser(__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="runs, one after the other")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args()
    command, codes = args.command[1:] if args.command[:1] == ["--"] else args.command, Counter()
    if not command or args.times < 1:
        parser.error("give a number of runs above 0, and -- and a command")
    for number in range(1, args.times + 1):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        codes[done.returncode] += 1
        if done.returncode:
            print(f"run {number} ended with {done.returncode}:\n{done.stdout[-SHOWN:]}", flush=True)
    print(", ".join(f"{count} x exit code {code}" for code, count in sorted(codes.items())))
    return int(set(codes) != {0})


if __name__ == "__main__":
    sys.exit(main())

"""Run any command on the Ascend host: MindSpore's Ascend backend, computing on this processor."""

import argparse
import os
import shutil

from mindsigma import command_line
from mindsigma.errors import MindSigmaError

DESCRIPTION = "Run a command on MindSpore's own Ascend backend without an NPU: CANN is stood in for by this processor."
EXAMPLE = 'python tools/ascend_host.py -- python tools/generate.py "a red apple" --device Ascend'


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(DESCRIPTION, EXAMPLE, usage="%(prog)s [options] -- COMMAND ...")
    add = parser.add_argument
    add(
        "--dry", action="store_true", help="compile, select kernels and plan memory; compute nothing, results are zeros"
    )
    add("--cards", type=int, default=1, metavar="N", help="with --dry: this process is one of N cards")
    add("--rank", type=int, default=0, metavar="R", help="with --cards: which one, from 0")
    add("--gib", type=float, metavar="G", help="memory of the card in GiB; default 64")
    add("--trace", metavar="FILE", help="append a line for every kernel that is launched")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="after --")
    return parser


def main():
    """Build the host if need be and become the command; returns only to refuse."""
    args = build_parser().parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise MindSigmaError("give the command after --, as in: tools/ascend_host.py -- python tools/generate.py ...")
    if args.cards < 1 or not 0 <= args.rank < args.cards:
        raise MindSigmaError(
            f"--rank {args.rank} of --cards {args.cards}: ranks count from 0 to the number of cards - 1"
        )
    if args.cards > 1 and not args.dry:
        raise MindSigmaError("--cards goes with --dry; real ranks are started by msrun, see tools/launch")
    if args.gib is not None and not 0 < args.gib <= 1024:
        raise MindSigmaError(f"--gib {args.gib:g}: more than 0 and at most 1024")
    program = shutil.which(command[0])
    if program is None:
        raise MindSigmaError(f"{command[0]}: no such command")
    from mindsigma.ascend_host.environment import host_environment

    changes = host_environment(args.dry, args.gib, args.cards, args.rank, args.trace)
    os.execve(program, command, {**os.environ, **changes})


def run():
    """Entry point."""
    command_line.run(main)

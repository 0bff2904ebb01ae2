"""Processes that share a work without meeting: which part of it is this one's."""

import os

from mindsigma.errors import MindSigmaError, say


def add_ranks(add):
    """Add --rank and --ranks; `add`: add_argument of a parser or a group."""
    add("--rank", type=int, help="number of this process; default the environment's RANK_ID, else 0")
    add("--ranks", type=int, help="number of processes; default the environment's RANK_SIZE, else 1")


def is_scheduler():
    """Whether this is msrun's scheduler, which has no part of the work; says so."""
    scheduler = os.environ.get("MS_ROLE") == "MS_SCHED"
    if scheduler:
        say("the scheduler of msrun has nothing to do: the ranks need not meet")
    return scheduler


def rank_of(args):
    """(rank, ranks) from the flags or the environment."""
    values = []
    for flag, variable, default in (("rank", "RANK_ID", 0), ("ranks", "RANK_SIZE", 1)):
        value = getattr(args, flag)
        if value is None:
            text = os.environ.get(variable, "")
            if text and not text.isdigit():
                raise MindSigmaError(f"the environment's {variable} is {text!r}, not a number; give --{flag}")
            value = int(text) if text else default
        values.append(value)
    if not 0 <= values[0] < values[1]:
        raise MindSigmaError(f"--rank {values[0]} of --ranks {values[1]}: ranks count from 0")
    return values

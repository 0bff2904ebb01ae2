"""What a process tells the launcher that watches it: where it stands, in a small file of its own."""

import json
import os
import time
from pathlib import Path

FOLDER = "MINDSIGMA_HEARTBEATS"  # in the environment: a folder of this host, of the launcher
RUNNING, FINISHED, REFUSED = "running", "finished", "refused"
LEAVE = "leave"  # a file that the launcher makes when all have finished
LEAVE_SECONDS = 3600
BYTES = 1024  # of the file: one write, so that no reader sees half of one


def watched():
    """Whether a launcher watches this process, and will end what is left of the run."""
    return bool(os.environ.get(FOLDER))


def beat(state, step=0, doing="", message=""):
    """Tell the launcher, if there is one, where this process stands.

    Args:
        state: RUNNING; FINISHED: all is written; REFUSED: ends with a message that the user can mend.
        step: steps done.
        doing: what it does now.
    """
    if not watched() or os.environ.get("MS_ROLE") == "MS_SCHED":  # which runs the tool, too, as MindSpore's scheduler
        return
    told = {"state": state, "step": step, "doing": doing, "message": message[: BYTES // 4]}
    path = Path(os.environ[FOLDER]) / file_name(int(os.environ.get("RANK_ID") or 0))
    place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(place, json.dumps(told).encode().ljust(BYTES), 0)
    finally:
        os.close(place)


def leave(code):
    """End this process without MindSpore's exit hooks, one of which now and then crashes in one of several processes.

    One that comes to its end with 0 waits for the others of its host: what it leaves would look like a fault to them.
    """
    if code == 0:
        beat(FINISHED)
        end = time.monotonic() + LEAVE_SECONDS
        folder = Path(os.environ[FOLDER])
        while folder.is_dir() and not (folder / LEAVE).exists() and time.monotonic() < end:
            time.sleep(0.02)
    os._exit(code)


def file_name(rank):
    """Name of the file of a process."""
    return f"rank-{rank}.json"


def last_beat(folder, rank):
    """dict of what a process told last; None if it has not told anything yet."""
    try:
        told = json.loads((Path(folder) / file_name(rank)).read_bytes()[:BYTES])
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and {"state", "step", "doing", "message"} <= told.keys() else None

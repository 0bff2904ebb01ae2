"""A stand-in for a tool that the launcher starts: beats, and does in each attempt what its arguments say.

python launched_tool.py FOLDER DO,DO,... [DO,DO,...] ...   what each process does, for the attempts 0, 1, ...

finish, die (by SIGKILL), fail (code 3), refuse (code 2 and a message), hang, crash (SIGSEGV when all is done), stop
(waits for SIGTERM and finishes).
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mindsigma import heartbeat  # noqa: E402


def schedule():
    """What a scheduler is to the launcher: something that listens."""
    server = socket.create_server((os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"])))
    while True:
        server.accept()


def main():
    """Take part in an attempt."""
    if os.environ["MS_ROLE"] == "MS_SCHED":
        schedule()
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK_ID"])
    attempts = [argument for argument in sys.argv[2:] if "," in argument]
    started = folder / f"started-{rank}"
    attempt = len(started.read_text().splitlines()) if started.exists() else 0
    with open(started, "a") as file:
        file.write(f"{os.environ['MS_WORKER_NUM']} {' '.join(sys.argv[2 + len(attempts) :])}\n")
    what = attempts[attempt].split(",")[rank]
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    print(f"attempt {attempt}, process {rank}: {what}", flush=True)
    heartbeat.beat(heartbeat.RUNNING, 7, "in a step")
    others = [folder / f"started-{i}" for i in range(int(os.environ["MS_WORKER_NUM"]))]
    while not all(other.exists() and len(other.read_text().splitlines()) > attempt for other in others):
        time.sleep(0.01)  # until all have begun this attempt
    if what == "refuse":
        heartbeat.beat(heartbeat.REFUSED, message="no such data")
        os._exit(2)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        os._exit(3)
    if what == "crash":
        heartbeat.beat(heartbeat.FINISHED)
        os.kill(os.getpid(), signal.SIGSEGV)
    while what in ("hang", "stop") and not ended:
        time.sleep(0.02)
    heartbeat.leave(0)


if __name__ == "__main__":
    main()

"""A tool that starts measure_worker.py, prints its process id and waits until its own input ends."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tools")]

from measure.turns import Worker  # noqa: E402

if __name__ == "__main__":
    script = Path(__file__).with_name("measure_worker.py")
    worker = Worker(sys.executable, script, "case", {"value": 1.0, "most": 1})
    print(worker._process.pid, flush=True)
    sys.stdin.read()

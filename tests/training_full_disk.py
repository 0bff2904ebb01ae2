"""tools/train.py on a disk that is full from the second checkpoint on: no file may be longer than 30000 bytes."""

import pathlib
import resource
import runpy
import signal
import sys
from unittest import mock

TRAIN = pathlib.Path(__file__).parents[1] / "tools" / "train.py"
sys.path.insert(0, str(TRAIN.parents[1]))

from mindsigma.training.checkpoints import RunCheckpoints  # noqa: E402

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = RunCheckpoints.save

    def saved(checkpoints, step, *arguments):
        if step > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
        return save(checkpoints, step, *arguments)

    mock.patch.object(RunCheckpoints, "save", saved).start()
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")

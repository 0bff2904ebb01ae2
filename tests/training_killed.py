"""tools/train.py, which ends by SIGKILL at an event: python training_killed.py EVENT OPTION ...

Events are the replacement and removal of files and folders, the writing of tensors and documents, the making of
folders, counted from 0, from the save of step 2 to that of step 4. After that one the process ends with code 7.
"""

import os
import pathlib
import runpy
import signal
import sys
from unittest import mock

TRAIN = pathlib.Path(__file__).parents[1] / "tools" / "train.py"
sys.path.insert(0, str(TRAIN.parents[1]))

from mindsigma.training.checkpoints import RunCheckpoints  # noqa: E402

FIRST_SAVE, LAST_SAVE, PASSED = 2, 4, 7


class Countdown:
    """Kills this process at an event."""

    def __init__(self, event):
        self.left, self.counting = event, False

    def watch(self, place, name):
        """Count the calls of a function."""
        function = getattr(place, name)

        def counted(*arguments, **keywords):
            if self.counting:
                self.left -= 1
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        mock.patch.object(place, name, counted).start()

    def watch_saves(self):
        """Begin with a save, end with another."""
        save = RunCheckpoints.save

        def saved(checkpoints, step, *arguments):
            self.counting = step >= FIRST_SAVE
            try:
                return save(checkpoints, step, *arguments)
            finally:
                if step >= LAST_SAVE:
                    os._exit(PASSED)

        mock.patch.object(RunCheckpoints, "save", saved).start()


if __name__ == "__main__":
    countdown = Countdown(int(sys.argv.pop(1)))
    countdown.watch_saves()
    for operation in ("replace", "fsync", "unlink", "rmdir"):
        countdown.watch(os, operation)
    countdown.watch(pathlib.Path, "mkdir")
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")

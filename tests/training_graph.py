"""tools/train.py in graph mode, as on an NPU."""

import runpy
import sys
from pathlib import Path
from unittest import mock

import mindspore as ms

TRAIN = Path(__file__).parents[1] / "tools" / "train.py"
sys.path.insert(0, str(TRAIN.parents[1]))

from mindsigma.training import trainer  # noqa: E402

if __name__ == "__main__":
    set_device = trainer.set_device

    def in_graph_mode(name):
        set_device(name)
        ms.set_context(mode=ms.GRAPH_MODE)

    mock.patch.object(trainer, "set_device", in_graph_mode).start()
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")

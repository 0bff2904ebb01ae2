"""tools/train.py, of which steps are left out because their loss is not finite. Run by test_ascend_training.py.

python tests/ascend_skipped.py 1,2,7 OPTIONS OF train.py
"""

import sys

import numpy as np
from conftest import load_tool
from mindspore import Tensor

from mindsigma.command_line import run
from mindsigma.training.denoising import Training

if __name__ == "__main__":
    skipped = {int(step) for step in sys.argv.pop(1).split(",") if step}
    whole = Training.micro_batches

    def micro_batches(self, *batches):
        """Those of the method, with latents that are not finite in a step that is to be left out."""
        found = whole(self, *batches)
        if self.run.step + 1 in skipped:
            found = [(Tensor(np.full(one[0].shape, np.inf, np.float32)), *one[1:]) for one in found]
        return found

    Training.micro_batches = micro_batches
    run(load_tool("train").main)

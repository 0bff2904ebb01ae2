"""Five training steps of a tiny network on a device; writes all that they changed. Run by test_ascend_training.py.

python tests/ascend_training.py Ascend OUT.npz came
"""

import sys

import numpy as np

from mindsigma import runtime

if __name__ == "__main__":
    device, out, optimizer = sys.argv[1:]
    runtime.set_device(device)
    runtime.set_device = lambda *_: device  # conftest.py would choose the CPU
    from test_training_step import RATE, broken, inputs, step_of, variables

    step = step_of(optimizer, accumulation=2, ema_decay=0.9, max_norm=0.5, loss_scale=8.0)
    results = []
    for i in range(5):
        second = broken(2 * i + 1) if i == 2 else inputs(2 * i + 1)
        results.append(step.run([inputs(2 * i), second], RATE))
    np.savez(out, results=np.array(results), controls=step.controls.asnumpy(), **variables(step))

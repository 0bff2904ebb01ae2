"""Five training steps of a tiny network on a device; writes all that they changed. Run by test_ascend_training.py.

python tests/ascend_training.py Ascend OUT.npz came plain
"""

import sys

import numpy as np

from mindsigma.runtime import set_device

if __name__ == "__main__":
    device, out, optimizer, settings = sys.argv[1:]
    set_device(device)
    from test_training_step import RATE, broken, inputs, step_of, variables

    plain = settings == "plain"
    more = {} if plain else {"accumulation": 2, "ema_decay": 0.9, "loss_scale": 8.0}
    step = step_of(optimizer, max_norm=0.5, **more)
    results = []
    for i in range(5):
        last = broken(2 * i + 1) if i == 2 else inputs(2 * i + 1)
        results.append(step.run([last] if plain else [inputs(2 * i), last], RATE))
    np.savez(out, results=np.array(results), controls=step.controls.asnumpy(), **variables(step))

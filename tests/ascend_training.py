"""Five training steps of a tiny network on a device; writes all that they changed. Run by test_ascend_training.py.

python tests/ascend_training.py Ascend OUT.npz came plain
"""

import sys

import mindspore as ms
import numpy as np

from mindsigma.runtime import set_device

if __name__ == "__main__":
    device, out, optimizer, settings = sys.argv[1:]
    set_device(device)
    from test_training_step import RATE, broken, inputs, step_of, variables

    if settings == "masters":
        from training_runs import tiny_dit

        found = {}
        for masters in (False, True):
            network = tiny_dit(depth=2, dtype=ms.bfloat16, kv_compression="uniform:2:1-1")
            step = step_of(optimizer, network, max_norm=0.5, masters=masters)
            results = np.array([step.run([inputs(i)], RATE) for i in range(3)])
            found |= {f"{masters} {name}": value for name, value in {"results": results, **variables(step)}.items()}
        np.savez(out, **found)
        sys.exit()
    plain = settings == "plain"
    more = {} if plain else {"accumulation": 2, "ema_decay": 0.9, "loss_scale": 8.0}
    step = step_of(optimizer, max_norm=0.5, **more)
    results = []
    for i in range(5):
        last = broken(2 * i + 1) if i == 2 else inputs(2 * i + 1)
        results.append(step.run([last] if plain else [inputs(2 * i), last], RATE))
    np.savez(out, results=np.array(results), controls=step.controls.asnumpy(), **variables(step))

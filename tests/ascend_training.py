"""A few training steps of a tiny network on a device; writes all that they changed. Run by test_ascend_training.py.

python tests/ascend_training.py Ascend OUT.npz came plain
"""

import sys

import mindspore as ms
import numpy as np

from mindsigma.models.controlnet import ControlNet
from mindsigma.models.dit import DiT
from mindsigma.runtime import DTYPES, set_device
from mindsigma.training.controlnet import ControlledDenoising
from mindsigma.training.learner import ControlNetLearner
from mindsigma.training.optimizers import OptimizerConfig
from mindsigma.training.step import StepConfig, TrainingStep


def of_controlnet(dtype):
    """What three steps of a ControlNet beside a frozen network tell and change; the network in a dtype of DTYPES."""
    from test_training_step import RATE, inputs, variables
    from training_runs import tiny_dit

    network = tiny_dit(depth=3)
    dit = DiT(network.config, DTYPES[dtype], parameter_dtype=DTYPES[dtype]).set_train()
    values = dict(network.parameters_and_names())
    for name, parameter in dit.parameters_and_names():
        parameter.set_data(values[name].astype(parameter.dtype))
        parameter.requires_grad = False
    controlnet = ControlNet.from_dit(dit, 2).set_train()
    parameters = ControlNetLearner(controlnet).parameters
    config = StepConfig(max_norm=0.5, ema_decay=0.9)
    step = TrainingStep(ControlledDenoising(dit, controlnet), parameters, OptimizerConfig("adamw", eps=(1e-3,)), config)
    start = {f"start {name}": value for name, value in variables(step).items()}
    conditions = np.random.default_rng(9).standard_normal((3, 4, 4, 8, 8)).astype(np.float32)
    results = [step.run([(*inputs(i), ms.Tensor(conditions[i]))], 10 * RATE) for i in range(3)]
    return {"results": np.array(results), **start, **variables(step)}


FIRST_SCALE = 2.0**40  # a loss scale for which no gradient fits fp16

if __name__ == "__main__":
    device, out, optimizer, settings = sys.argv[1:]
    set_device(device)
    from test_training_step import RATE, broken, inputs, step_of, variables

    if settings in DTYPES:
        np.savez(out, **of_controlnet(settings))
        sys.exit()
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
    if settings in ("overflow", "recompute", "lora"):
        from training_runs import tiny_dit

        from mindsigma.training.learner import AdapterLearner
        from mindsigma.training.lora import AdapterConfig, new_adapter
        from mindsigma.training.updates import SCALE, SKIPPED

        half = ms.float16 if settings == "overflow" else ms.bfloat16
        found = {}
        for recompute in (False, True) if settings == "recompute" else (False,):
            network = tiny_dit(depth=2, dtype=half if device == "Ascend" else ms.float32)
            learner = AdapterLearner(network, new_adapter(network, AdapterConfig(4))) if settings == "lora" else None
            if recompute:
                for block in network.blocks:
                    block.recompute()
            scale = FIRST_SCALE if settings == "overflow" and device == "Ascend" else 0.0
            parameters = learner.parameters if learner else None
            step = step_of(
                optimizer, network, parameters=parameters, max_norm=0.5, loss_scale=scale, masters=learner is None
            )
            results, seed = [], 0
            while seed < 4:
                results.append(step.run([inputs(seed)], RATE))
                seed += int(results[-1][-1])  # after an overflow the same again
            name = "recompute" if recompute else settings if settings != "recompute" else "plain"
            found |= {f"{name} {key}": value for key, value in {"results": results, **variables(step)}.items()}
            found["scale"], found["skipped"] = step.controls.asnumpy()[[SCALE, SKIPPED]]
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

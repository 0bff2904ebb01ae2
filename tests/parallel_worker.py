"""What each process of tests/test_parallel.py does: draws the cases, counts what it sends, writes an .npz.

python parallel_worker.py FOLDER MODE:CASE,CASE ...; in graph mode where it says graph-MODE.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, ops  # noqa: E402
from training_runs import TOKENS, WIDTH, tiny_dit  # noqa: E402

from mindsigma.distributed import Collectives, join_ranks  # noqa: E402
from mindsigma.models.controlnet import ControlNet  # noqa: E402
from mindsigma.models.vae import VAE  # noqa: E402
from mindsigma.models.vae_config import VAEConfig  # noqa: E402
from mindsigma.models.vae_tiling import decode_tiled  # noqa: E402
from mindsigma.runtime import set_device  # noqa: E402
from mindsigma.sampling.controls import Control  # noqa: E402
from mindsigma.sampling.denoising import DenoisingGraphs, denoising_steps  # noqa: E402
from mindsigma.sampling.dpm_solver import DPMSolver  # noqa: E402
from mindsigma.sampling.iddpm import IDDPM  # noqa: E402
from mindsigma.sampling.parallel import ParallelGraphs, ParallelSampling  # noqa: E402
from mindsigma.sampling.perturbed import PerturbedAttention  # noqa: E402

STEPS = 3

# Perturbed attention in the cases of these names; of two layers one compresses.
PAG = {"pag": PerturbedAttention((0,), 3.0), "pag-conv": PerturbedAttention((1,), 3.0)}

# name: (latent height, width, configuration of the DiT); bands of 2 processes are equal, or not where it says so.
CASES = {
    "plain": (16, 16, {}),
    "conv": (16, 16, {"kv_compression": "conv:2:1"}),
    "uneven": (14, 22, {"kv_compression": "conv:2:1", "qk_norm": True}),  # 7 x 11 tokens: 4 + 3 rows, one is dropped
    "pag": (16, 16, {"kv_compression": "conv:2:1"}),
    "pag-conv": (14, 22, {"kv_compression": "conv:2:1"}),
    "every": (14, 10, {"kv_compression": "uniform_every:3:1"}),  # 7 x 5 tokens: 3 + 4 rows
    "uniform": (8, 24, {"kv_compression": "uniform:2:1"}),
    "pool": (32, 16, {"kv_compression": "pool:2:0,1"}),
    "micro": (24, 16, {"kv_compression": "conv:3:1", "micro_condition": True, "hidden_size": 48}),
    "uneven-tall": (38, 12, {"kv_compression": "ave:2:1"}),  # 19 x 6 tokens
    "variance": (14, 16, {}),
    "control": (14, 22, {"kv_compression": "conv:2:0"}),  # the copy compresses, too
    "control-guess": (14, 22, {"kv_compression": "conv:2:1"}),  # of guidance the copies see one half
    "control-two": (16, 16, {"depth": 3, "micro_condition": True, "hidden_size": 48}),
    "control-unguided": (14, 16, {}),
}
# name: blocks of each ControlNet beside it, whether in guess mode.
CONTROLS = {
    "control": ((1,), False),
    "control-guess": ((1,), True),
    "control-two": ((2, 1), False),
    "control-unguided": ((1,), False),
}
UNGUIDED = ("control-unguided",)
SAMPLERS = {"variance": IDDPM}  # the others are DPMSolver; this one draws noise and has the variance sent, too


class Counter:
    """Adds up what this process sends to the others in AllGathers outside graphs."""

    sent = 0

    @classmethod
    def install(cls):
        """Count from now on."""
        call = ops.AllGather.__call__

        def counted(gather, tensor):
            cls.sent += tensor.nbytes * (gather.rank_size - 1)
            return call(gather, tensor)

        ops.AllGather.__call__ = counted


def case_inputs(height, width, config, sampler=DPMSolver, images=2):
    """DiT and arguments of denoising_steps for a case."""
    dit = tiny_dit(**config)
    dit.set_train(False)
    random = np.random.default_rng(3)
    latents = random.standard_normal((images, 4, height, width)).astype(np.float32)
    captions = []
    for _ in range(2):
        states = random.standard_normal((images, TOKENS, WIDTH)).astype(np.float32)
        mask = (np.arange(TOKENS) < np.array([[5], [TOKENS]])).astype(np.int32)[:images]
        captions.append((Tensor(states), Tensor(mask)))
    conditions = None
    if config.get("micro_condition"):
        size = np.array([[height * 8.0, width * 8.0]], np.float32)
        conditions = Tensor(size), Tensor(np.array([[height / width]], np.float32))
    return dit, (Tensor(latents), sampler(), STEPS, captions[0], 4.5, captions[1], conditions)


def fresh_noise(draw, shape):
    """The same in all processes."""
    return np.random.default_rng([3, draw]).standard_normal(shape)


def controls(name, dit, shape):
    """list of Control of a case, for latents of a shape."""
    layers, guess = CONTROLS.get(name, ((), False))
    result, random = [], np.random.default_rng(5)
    for count in layers:
        controlnet = ControlNet.from_dit(dit, count)
        for linear in (controlnet.before_proj, *controlnet.after_proj):
            linear.weight.set_data(Tensor(random.normal(0, 0.1, linear.weight.shape), ms.float32))
        result.append(Control(controlnet.set_train(False), random.standard_normal(shape), guess=guess))
    return result


def draw(graphs, arguments, name=None):
    """Latents after every step, (steps, N, c, h, w)."""
    ones = controls(name, graphs.dit, arguments[0].shape)
    if name in UNGUIDED:
        *first, unconditional, conditions = arguments
        arguments = *first, None, conditions
    trajectory = denoising_steps(graphs, *arguments, fresh_noise=fresh_noise, pag=PAG.get(name), controls=ones)
    next(trajectory)
    return np.stack([step.latents.asnumpy() for step in trajectory])


def tiny_vae():
    """A VAE of random weights."""
    ms.set_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8))
    return vae, np.random.default_rng(4).standard_normal((1, 4, 40, 24), np.float32)


def alone(names):
    """What one process draws: dict case -> latents."""
    result = {}
    for name in names:
        dit, arguments = case_inputs(*CASES[name], SAMPLERS.get(name, DPMSolver))
        result[name] = draw(DenoisingGraphs(dit), arguments, name)
    return result


def together(parallel, names):
    """The same by all processes, and `NAME-sent`, the bytes that this one sent a step."""
    result = {}
    for name in names:
        dit, arguments = case_inputs(*CASES[name], SAMPLERS.get(name, DPMSolver))
        graphs = ParallelGraphs(dit, parallel)
        Counter.sent = 0
        result[name] = draw(graphs, arguments, name)
        result[f"{name}-sent"] = Counter.sent / STEPS
    return result


def main():
    """Draw and write FOLDER/rank_N.npz."""
    folder, *jobs = sys.argv[1:]
    set_device("CPU")
    ranks = join_ranks()
    Counter.install()
    vae, latents = tiny_vae()
    result = {"tiles": decode_tiled(vae, latents, tile=16, apply=Collectives(ranks).spread)}
    for job in jobs:
        mode, _, names = job.partition(":")
        ms.set_context(mode=ms.GRAPH_MODE if mode.startswith("graph-") else ms.PYNATIVE_MODE)
        drawn = together(ParallelSampling(mode.removeprefix("graph-"), ranks), names.split(","))
        result.update({f"{mode}/{name}": value for name, value in drawn.items()})
    np.savez(Path(folder) / f"rank_{ranks.rank}.npz", **result)


if __name__ == "__main__":
    main()

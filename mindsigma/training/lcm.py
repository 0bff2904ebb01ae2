"""Latent consistency distillation (arXiv 2310.04378) of a DiT into one that draws in a few steps without guidance.

The student is asked, at a time of a coarse grid, for what it says at an earlier one: a DDIM step of the guided teacher
leads there, and an average of the student's own weights, the target, answers. The student may be a LoRA.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Tuple

import numpy as np
from mindspore import ParameterTuple, ops

from mindsigma.choices import LCM_LOSSES, LCM_WEIGHTINGS
from mindsigma.data import generator
from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import mean, split, unstack
from mindsigma.sampling.lcm import LCM as LCMSampler
from mindsigma.sampling.lcm import boundary_scales
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS, alphas_cumprod
from mindsigma.training.inputs import StepInputs, tensor
from mindsigma.training.method import Distillation
from mindsigma.training.needed import frozen, weights_of
from mindsigma.training.objective import Objective, noise_of_both, noise_part
from mindsigma.training.twins import copy_of, teacher_of

# Columns of `coefficients`, in this order; then signal and noise, sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), at
# each time on the way from the start, where the student is asked, to the end, where the target is.
COLUMNS = (
    "guidance",  # w
    "skip",  # c_skip at the start
    "out",  # c_out at the start
    "end_skip",
    "end_out",
)


@dataclass(frozen=True)
class LCMConfig:
    """The loss.

    Attributes:
        guidance: w of the teacher, which steps along conditional + w (conditional - unconditional), a guidance scale of
            1 + w; two numbers: drawn between them for each sample. The student is not told.
        loss: "huber", sqrt(x² + huber²) - huber, or "l2".
        huber: its width.
        weighting: "none", or "signal": each sample's loss times its signal at the start, 0.006 to 1. There an error of
            the predicted noise is divided by it, so that the noisiest samples outweigh all others.
        grid: points of the coarse grid.
        skip: how many points the teacher goes back. More teach faster and, in one step, less exactly.
        substeps: DDIM steps that it takes for that.
    """

    guidance: Tuple[float, float] = (4.5, 4.5)
    loss: str = "huber"
    huber: float = 0.001
    weighting: str = "none"
    grid: int = 50
    skip: int = 1
    substeps: int = 1

    def __post_init__(self):
        low, high = self.guidance
        if not 0 <= low <= high < np.inf:
            raise MindSigmaError(f"--lcm-guidance must be one number of at least 0, or two, rising, not {low} {high}")
        if self.loss not in LCM_LOSSES:
            raise MindSigmaError(f"the loss must be one of {', '.join(LCM_LOSSES)}, not {self.loss!r}")
        if self.weighting not in LCM_WEIGHTINGS:
            raise MindSigmaError(f"the weighting must be one of {', '.join(LCM_WEIGHTINGS)}, not {self.weighting!r}")
        if not 0 < self.huber < np.inf:
            raise MindSigmaError(f"--lcm-huber must be a positive number, not {self.huber}")
        if self.grid < 1 or NUM_TRAIN_STEPS % self.grid:
            raise MindSigmaError(f"--lcm-grid must divide {NUM_TRAIN_STEPS}, not {self.grid}")
        if not 1 <= self.skip <= self.grid:
            raise MindSigmaError(f"--lcm-skip must lie in 1 ... {self.grid}, not {self.skip}")
        if not 1 <= self.substeps <= NUM_TRAIN_STEPS // self.grid:
            raise MindSigmaError(
                f"--lcm-substeps must lie in 1 ... {NUM_TRAIN_STEPS // self.grid}, not {self.substeps}"
            )

    def times(self, index):
        """int64 (substeps + 1, N), for grid points (N,) from 0: the way from there, 19, 39, ... 999, to the end.

        The end is `skip` points before, at least 0.
        """
        stride = NUM_TRAIN_STEPS // self.grid
        start = np.asarray(index, np.int64) * stride + stride - 1
        end = np.maximum(start - self.skip * stride, 0)
        share = np.arange(self.substeps + 1).reshape(-1, 1)
        return start - share * (start - end) // self.substeps


@lru_cache(maxsize=8)
def coefficient_table(config):
    """float64 (grid, len(COLUMNS) + 2 * (substeps + 1)) for an LCMConfig, the guidance left at 0."""
    times = config.times(np.arange(config.grid))
    boundaries = [scales for time in (times[0], times[-1]) for scales in zip(*map(boundary_scales, time))]
    products = alphas_cumprod()[times]
    path = [scales for row in products for scales in (np.sqrt(row), np.sqrt(1.0 - row))]
    return np.stack([np.zeros(config.grid), *boundaries, *path], 1)


def coefficients(index, guidance, config):
    """float32 (N, len(COLUMNS) + 2 * (substeps + 1)) for grid points (N,) and guidance (N,)."""
    table = coefficient_table(config)[np.asarray(index)].astype(np.float32)
    table[:, COLUMNS.index("guidance")] = guidance
    return table


def consistent(latents, noise, signal, sigma, skip, out):
    """The answer of a consistency model, (N, c, h, w), from the noise that the network predicts."""
    return skip * latents + out * ((latents - sigma * noise) / signal)


def guided_step(latents, unconditional, conditional, guidance, here, there):
    """The teacher's DDIM step, (N, c, h, w), from what it predicts without and with the caption.

    `here`, `there`: signal and noise at the time of the latents and at that of the result.
    """
    noise = conditional + guidance * (conditional - unconditional)
    clean = (latents - here[1] * noise) / here[0]
    return there[0] * clean + there[1] * noise


def distance(answer, target, signal, config):
    """Mean over all elements of the Huber or squared difference; `signal`: (N, 1, 1, 1), at the start."""
    difference = answer - target
    result = difference * difference
    if config.loss == "huber":
        result = ops.sqrt(result + config.huber**2) - config.huber
    return mean(result if config.weighting == "none" else signal * result)


def columns(numbers):
    """The columns of `coefficients`, (N, 1, 1, 1) each: those of COLUMNS, then the pairs (signal, noise)."""
    single = [column.reshape(-1, 1, 1, 1) for column in split(numbers, numbers.shape[1], 1)]
    first = len(COLUMNS)
    return single[:first], [single[i : i + 2] for i in range(first, len(single), 2)]


class Consistency(Objective):
    """The loss of the student.

    Args:
        dit: the student, in training mode.
        teacher: DiT, frozen.
        target: DiT with the averages of the student's weights.
        averages: the target's Parameters, see Objective.
        config: LCMConfig.
    """

    def __init__(self, dit, teacher, target, averages, config):
        super().__init__(dit)
        self.teacher, self.target, self.config = teacher, target, config
        self.averages = ParameterTuple(averages)

    def construct(self, clean, noise, numbers, times, caption, mask, null, null_mask, *conditions):
        """The loss of a micro-batch.

        Args:
            clean, noise: (N, c, h, w) fp32, scaled latents and standard normal noise.
            numbers: of `coefficients`, for the grid points.
            times: fp32 (substeps + 1, N), from start to end.
            caption, mask: (N, L, d) and (N, L).
            null, null_mask: null caption (1, L, d) and the mask of the unconditional half, (N, L).
            conditions: micro conditions, none or two.
        """
        (_, skip, out, _, _), path = columns(numbers)
        noisy = path[0][0] * clean + path[0][1] * noise
        earlier = self.earlier(noisy, numbers, times, (caption, mask), (null, null_mask), conditions)
        target = ops.stop_gradient(self.answer_at_end(earlier, numbers, times, (caption, mask), conditions))
        predicted = noise_part(self.dit(noisy, unstack(times, 0)[0], caption, mask, *conditions), clean)
        answer = consistent(noisy, predicted, *path[0], skip, out)
        return (distance(answer, target, path[0][0], self.config),)

    def earlier(self, latents, numbers, times, text, null, conditions):
        """Where the teacher's steps from noisy latents end, (N, c, h, w)."""
        (guidance, _, _, _, _), path = columns(numbers)
        times = unstack(times, 0)
        for i in range(self.config.substeps):
            both = noise_of_both(self.teacher, latents, times[i], text, null, conditions)
            latents = guided_step(latents, *both, guidance, path[i], path[i + 1])
        return latents

    def answer_at_end(self, earlier, numbers, times, text, conditions):
        """What the target answers there, (N, c, h, w)."""
        (_, _, _, skip, out), path = columns(numbers)
        end = unstack(times, 0)[self.config.substeps]
        predicted = noise_part(self.target(earlier, end, *text, *conditions), earlier)
        return consistent(earlier, predicted, *path[-1], skip, out)


class LCMInputs(StepInputs):
    """Makes micro-batches of the student; `loss` is an LCMConfig."""

    def timesteps(self, draws):
        """See StepInputs: the starts of grid points."""
        index = [generator(self.seed, "grid point", draw).integers(self.loss.grid) for draw in draws]
        return self.loss.times(index)[0]

    def tensors(self, batch, rows, clean, timestep, text, weight=1.0):
        """See StepInputs; `timestep`: any times, of which the grid points are taken. Rows have no weights."""
        draws = batch.draws[rows]
        index = np.asarray(timestep) * self.loss.grid // NUM_TRAIN_STEPS
        guidance = [generator(self.seed, "guidance", draw).uniform(*self.loss.guidance) for draw in draws]
        numbers = coefficients(index, guidance, self.loss)
        noise = self.normal("noise", draws, clean.shape[1:])
        arrays = clean, noise, numbers, self.loss.times(index).astype(np.float32), *text
        return (*map(tensor, arrays), *self.null_of(text), *self.conditions(batch, rows))


class LCM(Distillation):
    """Latent consistency distillation."""

    @classmethod
    def check(cls, args):
        """See Method."""
        super().check(args)
        cls.config_of(args)
        if not 0 < args.ema_decay < 1:
            raise MindSigmaError(f"--ema-decay of the target must lie in 0 ... 1 (exclusive), not {args.ema_decay}")

    @staticmethod
    def config_of(args):
        """LCMConfig of the options."""
        if len(args.lcm_guidance) > 2:
            raise MindSigmaError(f"--lcm-guidance takes one number or two, not {len(args.lcm_guidance)}")
        guidance = args.lcm_guidance[0], args.lcm_guidance[-1]
        names = ("loss", "huber", "weighting", "grid", "skip", "substeps")
        return LCMConfig(guidance, **{name: getattr(args, f"lcm_{name}") for name in names})

    def needed(self, component, dtype):
        """See Method: the target is the average that is counted there; beside an adapter the teacher is the network."""
        own = super().needed(component, dtype)
        return own if self.run.adapting else own + frozen(weights_of(component), dtype)

    def own_sampling(self):
        """See Method: the steps are those of its previews, or the sampler's own."""
        previews = self.args.sample_steps if self.args.sample_sampler == "lcm" else None
        return {"sampler": "lcm", "num_inference_steps": previews or LCMSampler.steps, "guidance_scale": 1.0}

    def build(self):
        """See Method."""
        run, config = self.run, self.config_of(self.args)
        teacher = teacher_of(run.dit, run.learner)
        target, averages = copy_of(run.dit, run.learner, "target")
        objective = Consistency(run.dit, teacher, target, averages.parameters, config)
        self.training = self.step_of(objective, run.learner.parameters, self.args.ema_decay)
        self.inputs = self.inputs_of(LCMInputs, config, run.source, self.args.seed)

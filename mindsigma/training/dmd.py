"""Distribution matching distillation (arXiv 2311.18828) of a DiT into one that draws in a single step.

The generator makes latents of noise. Two networks score them, once noised: the teacher knows the images' distribution,
the fake score, trained at the same time, that of the generator. Their difference is the generator's gradient.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindsigma.choices import DMD_REGRESSIONS
from mindsigma.data import FeatureSet, generator
from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import filled, mean, split
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS, alphas_cumprod
from mindsigma.training.inputs import StepInputs, tensor
from mindsigma.training.learning_rate import learning_rate, scaled_rate
from mindsigma.training.loss import COLUMNS, Denoising, LossConfig, coefficients, noisy_latents
from mindsigma.training.method import Distillation, Outcome, digest_of
from mindsigma.training.needed import frozen, learning, weights_of
from mindsigma.training.objective import Objective, noise_of_both, noise_part
from mindsigma.training.pictures import needed_of_pictures, open_pictures
from mindsigma.training.twins import copy_of, evaluated, teacher_of
from mindsigma.weights.lpips_weights import WHERE, open_lpips

SMALLEST_ERROR = 1e-5  # added to the mean difference that the gradient is divided by
REGRESSION_WIDTH = 0.001  # of the Huber loss


@dataclass(frozen=True)
class DMDConfig:
    """The loss.

    Attributes:
        time: that the generator is told.
        guidance: scale of the teacher's.
        last: the times at which latents are compared are drawn from 1 ... last - 1.
        snr_gamma: None; or weight the gradient by min(snr, gamma) / snr instead of by the error.
        regression: of the generator's latents to those that the teacher made of the same noise, or "lpips": of the
            pictures that these are.
        regression_weight: of that, beside the rest.
    """

    time: int = 400
    guidance: float = 3.0
    last: int = NUM_TRAIN_STEPS - 1
    snr_gamma: Optional[float] = None
    regression: str = "none"
    regression_weight: float = 0.25

    def __post_init__(self):
        if not 0 <= self.time < NUM_TRAIN_STEPS:
            raise MindSigmaError(f"--dmd-time must lie in 0 ... {NUM_TRAIN_STEPS - 1}, not {self.time}")
        if not 2 <= self.last <= NUM_TRAIN_STEPS:
            raise MindSigmaError(f"--dmd-last must lie in 2 ... {NUM_TRAIN_STEPS}, not {self.last}")
        for name, least in (("guidance", 0), ("regression_weight", 0)):
            if not least <= getattr(self, name) < np.inf:
                raise MindSigmaError(f"--dmd-{name.replace('_', '-')} must be a number of at least {least}")
        if self.snr_gamma is not None and not 0 < self.snr_gamma < np.inf:
            raise MindSigmaError(f"--dmd-snr-gamma must be a positive number, not {self.snr_gamma}")
        if self.regression not in DMD_REGRESSIONS:
            raise MindSigmaError(f"the regression must be one of {', '.join(DMD_REGRESSIONS)}, not {self.regression!r}")

    @property
    def noising(self):
        """LossConfig whose coefficients noise the latents; its weight is that of snr_gamma."""
        if self.snr_gamma is None:
            return LossConfig(learn_sigma=False)
        return LossConfig(learn_sigma=False, weighting="min-snr", gamma=self.snr_gamma)


def one_step(noise, predicted, time):
    """The generator's latents (N, c, h, w) from its noise and what the network predicts for it at `time`.

    The noise has deviation 1, although latents at that time would have a signal, too; sampling does the same.
    """
    product = float(alphas_cumprod()[time])
    return (noise - (1.0 - product) ** 0.5 * predicted) * product**-0.5


def compared(latents, noisy, real, fake, numbers):
    """How far the two scores lie apart, and the weight of that.

    Args:
        latents: (N, c, h, w) of the generator, noisy: the same, noised.
        real, fake: noise (N, c, h, w) that the guided teacher and the fake score predict for the noisy ones.
        numbers: fp32 (N, len(COLUMNS)), of loss.coefficients.

    Returns:
        clean latents by the fake score minus those by the teacher (N, c, h, w), and 1 / the mean error of the latter,
        (N, 1, 1, 1).
    """
    signal, sigma = (column.reshape(-1, 1, 1, 1) for column in split(numbers, len(COLUMNS), 1)[:2])
    real_clean = (noisy - sigma * real) / signal
    error = mean(ops.abs(latents - real_clean).reshape(latents.shape[0], -1), 1) + SMALLEST_ERROR
    return (real - fake) * (sigma / signal), (1.0 / error).reshape(-1, 1, 1, 1)


def matching_loss(latents, difference, weight):
    """A scalar whose gradient in the latents (N, c, h, w) is 2 weight difference / their size."""
    step = latents - ops.stop_gradient(latents - weight * difference)
    return mean(step * step)


def weighted_loss(latents, difference, numbers):
    """A scalar whose gradient in the latents (N, c, h, w) is the difference, weighted by min(snr, gamma) / snr.

    Its value is that of a product and may be negative.
    """
    weight = split(numbers, len(COLUMNS), 1)[COLUMNS.index("weight")].reshape(-1)
    products = mean((ops.stop_gradient(difference) * latents).reshape(latents.shape[0], -1), 1)
    return mean(weight * products)


def regression_loss(latents, wanted, kind):
    """Mean over all elements of the squared or Huber difference."""
    square = (latents - wanted) * (latents - wanted)
    if kind == "l2":
        return mean(square)
    return mean(ops.sqrt(square + REGRESSION_WIDTH**2) - REGRESSION_WIDTH)


class Matching(Objective):
    """The loss of the generator, which hands on its latents (N, c, h, w).

    Args:
        dit: the generator, in training mode.
        teacher, fake: DiTs, to be evaluated only.
        config: DMDConfig.
        pictures: PictureDistance of regression "lpips", else None.
    """

    def __init__(self, dit, teacher, fake, config, pictures=None):
        super().__init__(dit)
        self.teacher, self.fake, self.config, self.pictures = teacher, fake, config, pictures
        self.terms = ("matching",) if config.regression == "none" else ("matching", "regression")

    def construct(self, noise, fresh, numbers, timestep, caption, mask, null, null_mask, wanted, *conditions):
        """The loss of a micro-batch.

        Args:
            noise: (N, c, h, w) fp32, that the generator begins from.
            fresh: (N, c, h, w) fp32, that its latents are noised with.
            numbers: fp32 (N, len(COLUMNS)), of loss.coefficients for the timesteps.
            timestep: fp32 (N,), at which the scores are compared.
            caption, mask: (N, L, d) and (N, L).
            null, null_mask: null caption (1, L, d) and mask (N, L).
            wanted: (N, c, h, w) for the regression, else None.
            conditions: micro conditions, none or two.
        """
        config, text, null = self.config, (caption, mask), (null, null_mask)
        time = filled(timestep.shape, float(config.time), ms.float32)
        latents = one_step(noise, noise_part(self.dit(noise, time, *text, *conditions), noise), config.time)
        fixed = ops.stop_gradient(latents)
        difference, weight = self.direction(fixed, fresh, numbers, timestep, text, null, conditions)
        if config.snr_gamma is None:
            matching = matching_loss(latents, ops.stop_gradient(difference), ops.stop_gradient(weight))
        else:
            matching = weighted_loss(latents, difference, numbers)
        if config.regression == "none":
            return matching, fixed
        return matching, config.regression_weight * self.regression(latents, wanted), fixed

    def regression(self, latents, wanted):
        """A scalar for latents and those wanted, (N, c, h, w)."""
        if self.config.regression == "lpips":
            return self.pictures(latents, wanted)
        return regression_loss(latents, wanted, self.config.regression)

    def direction(self, latents, fresh, numbers, timestep, text, null, conditions):
        """`compared` for latents noised at the timesteps."""
        noisy = noisy_latents(latents, fresh, numbers)
        unconditional, conditional = noise_of_both(self.teacher, noisy, timestep, text, null, conditions)
        real = unconditional + self.config.guidance * (conditional - unconditional)
        fake = noise_part(self.fake(noisy, timestep, *text, *conditions), noisy)
        return compared(latents, noisy, real, fake, numbers)


class DMDInputs(StepInputs):
    """Makes micro-batches of the generator, and what the fake score takes besides the latents; `loss`: DMDConfig."""

    def latents(self, batch, rows):
        """See StepInputs; None unless there is a regression, as images are not needed."""
        return None if self.loss.regression == "none" else super().latents(batch, rows)

    def timesteps(self, draws, purpose="timestep"):
        """See StepInputs; int64 (n,) of 1 ... last - 1."""
        return np.array([generator(self.seed, purpose, draw).integers(1, self.loss.last) for draw in draws])

    def tensors(self, batch, rows, clean, timestep, text, weight=1.0):
        """(inputs of Matching, inputs of the fake score's Denoising behind the latents). Rows have no weights."""
        draws, config = batch.draws[rows], self.loss
        shape = self.vae_config.latent_channels, *(side // self.vae_config.downsampling for side in batch.size)
        noise = self.normal("noise", draws, shape) if clean is None else batch.noise[rows]
        text, null, conditions = [tensor(one) for one in text], self.null_of(text), self.conditions(batch, rows)
        times = timestep, self.timesteps(draws, "timestep of the fake score")
        fresh = self.normal("fresh noise", draws, shape), self.normal("noise of the fake score", draws, shape)
        # The fake score learns without weights, whatever snr_gamma: the official trainer's are those of other times.
        losses = config.noising, LossConfig(learn_sigma=False)
        numbers = [tensor(coefficients(time, loss)) for time, loss in zip(times, losses)]
        fresh, times = [tensor(one) for one in fresh], [tensor(time.astype(np.float32)) for time in times]
        wanted = None if clean is None else tensor(clean)
        mine = tensor(noise), fresh[0], numbers[0], times[0], *text, *null, wanted, *conditions
        return mine, (fresh[1], numbers[1], times[1], *text, *conditions)


class DMD(Distillation):
    """Distribution matching distillation."""

    @classmethod
    def check(cls, args):
        """See Method."""
        super().check(args)
        cls.config_of(args)
        if args.dmd_regression == "lpips":
            if not args.lpips_weights:
                raise MindSigmaError(f"--dmd-regression lpips needs --lpips-weights. {WHERE}")
            open_lpips(args.lpips_weights)
        if args.validation_data:
            raise MindSigmaError("--validation-data: the loss of DMD says nothing about held-out images; see --prompts")
        for name in ("dmd_fake_learning_rate", "dmd_fake_warmup"):
            value = getattr(args, name)
            if value is not None and not 0 <= value < np.inf:
                raise MindSigmaError(f"--{name.replace('_', '-')} must be a number of at least 0, not {value}")

    @staticmethod
    def config_of(args):
        """DMDConfig of the options."""
        return DMDConfig(
            args.dmd_time,
            args.dmd_guidance,
            args.dmd_last,
            args.dmd_snr_gamma,
            args.dmd_regression,
            args.dmd_regression_weight,
        )

    def needed(self, component, dtype):
        """See Method: the generator, the teacher, and the fake score, whose gradients come after the generator's."""
        own, run, numbers = super().needed(component, dtype), self.run, weights_of(component)
        if self.args.dmd_regression == "lpips":
            own += needed_of_pictures(run.components.opened("vae"))
        if run.adapting:
            return own
        fake = learning(self.args, numbers, processes=run.ranks.count, averaged=False)
        return own + frozen(numbers, dtype) + replace(fake, gradients=0)

    def build(self):
        """See Method."""
        args, run, config = self.args, self.run, self.config_of(self.args)
        pairs = isinstance(run.source, FeatureSet) and run.source.has_noise
        if config.regression != "none" and not pairs:
            raise MindSigmaError(f"{args.data}: holds no pairs, which --dmd-regression needs: tools/make_pairs.py")
        teacher = teacher_of(run.dit, run.learner)
        fake, self.fake_learner = copy_of(run.dit, run.learner, "fake", learns=True)
        self.fake_learner.sampling = {}  # it draws nothing
        if args.recompute:
            for block in fake.blocks:
                block.recompute()
        pictures = None
        if config.regression == "lpips":
            pictures = open_pictures(run.components.opened("vae"), args.lpips_weights)
            if args.recompute:
                pictures.one.recompute()
        objective = Matching(run.dit, teacher, evaluated(fake), config, pictures)
        self.training = self.step_of(objective, run.learner.parameters, args.ema_decay)
        self.fake_training = self.step_of(Denoising(fake, bound=False), self.fake_learner.parameters)
        self.inputs = self.inputs_of(DMDInputs, config, run.source, args.seed)
        rate = args.learning_rate if args.dmd_fake_learning_rate is None else args.dmd_fake_learning_rate
        self.fake_rate = scaled_rate(rate, run.batch, args.auto_lr)

    def identity(self):
        """See Method; what judges the pictures decides the loss, too."""
        pictures = self.training.objective.pictures
        return {**super().identity(), **({} if pictures is None else {"lpips": digest_of(pictures)})}

    def train(self, batches, rate):
        """See Method: a step of the generator, and one of the fake score on the latents from before it."""
        args, terms = self.args, self.training.objective.terms
        warmup = args.warmup if args.dmd_fake_warmup is None else args.dmd_fake_warmup
        fake_rate = learning_rate(self.run.step, self.fake_rate, args.lr_schedule, warmup, args.steps, args.lr_final)
        rate, fake_rate = Tensor([rate], ms.float32), Tensor([fake_rate], ms.float32)
        micro_batches, found = self.micro_batches(*batches), []
        for i, (mine, others) in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            own = self.training(rate, last, *mine)
            found.append((own, self.fake_training(fake_rate, last, own[len(terms)], *others)))
        means = [np.mean([float(own[i].asnumpy()) for own, _ in found]) for i in range(len(terms))]
        fake = np.mean([float(of_fake[0].asnumpy()) for _, of_fake in found])
        own, of_fake = found[-1]
        norms = {"grad_norm": float(own[-2].asnumpy()[0]), "fake_grad_norm": float(of_fake[-2].asnumpy()[0])}
        return Outcome(dict(zip(terms, map(float, means))), norms, {"fake": float(fake)})

    def sampling(self):
        """See Method."""
        own = self.own_sampling()
        return {"timesteps": own["timesteps"]} if self.args.sample_sampler == own["sampler"] else {}

    def own_sampling(self):
        """See Method."""
        own = {"sampler": "one-step", "num_inference_steps": 1, "guidance_scale": 1.0}
        return {**own, "timesteps": (self.args.dmd_time,)}

    def steps(self):
        """See Method."""
        return {"": self.training, "fake": self.fake_training}

    def contents(self):
        """See Method."""
        contents = super().contents()
        contents.products[f"fake{Path(self.run.learner.product).suffix}"] = self.fake_learner, None
        for name, value in self.fake_training.own_states().items():
            contents.states["fake.controls" if name == "controls" else name] = value
        return contents

"""What a sampler is: a table made before sampling starts, and one step on the device that takes a row of it."""

from dataclasses import dataclass
from typing import Tuple

import numpy as np
from mindspore import Tensor, nn

from mindsigma.arguments import one_of, whole
from mindsigma.errors import MindSigmaError
from mindsigma.sampling import CONVENTIONS, SAMPLER_OPTIONS, SAMPLERS, sampler_class
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS

OFFICIALLY_GUIDED = 3  # channels of latents that the official forward_with_cfg guides


@dataclass(frozen=True)
class Row:
    """One step of a table.

    Attributes:
        timestep: what the model is told, in training steps; fractions are kept.
        numbers: of the step.
        alpha, sigma: scales of signal and noise of the latents that the model sees: alpha * clean + sigma * noise, with
            alpha² + sigma² = 1 in every sampler.
        draws: whether the step takes fresh noise, if the sampler `draws`.
    """

    timestep: float
    numbers: Tuple[float, ...]
    alpha: float
    sigma: float
    draws: bool = True


class Sampler(nn.Cell):
    """One step of a sampler, a part of the graph of a denoising step.

    The constructor of a sampler takes `convention` and, by keyword, what `takes` names; None is its own default.

    Attributes:
        takes: names of the SamplingOptions that are this sampler's own.
        steps: number of steps unless another is asked for.
        guidance: guidance scale unless another is asked for.
        guided_channels: how many of the latents' channels are guided, the first ones; the others keep the conditional
            prediction. None is all.
        kept: latents that a step keeps for later ones, zero at the start.
        draws: whether a step takes fresh standard normal noise.
        first_draw: number of the first step's draw.
        learned_variance: whether a step takes what the network predicts besides the noise.
    """

    takes = ()
    steps = 20
    guidance = 4.5
    guided_channels = None
    kept = 0
    draws = False
    first_draw = 0
    learned_variance = False

    spacing = karras = timesteps = sigmas = None

    def __init__(self, convention="diffusers", **grid):
        """`grid`: what the caller chose of spacing, karras, timesteps and sigmas, of which one excludes the others."""
        super().__init__(auto_prefix=False)
        self.convention = one_of("convention", convention, CONVENTIONS)
        chosen = [name for name, value in grid.items() if value is not None and value is not False]
        if len(chosen) > 1:
            raise MindSigmaError(f"{chosen[0]} and {chosen[1]} exclude each other; give one of them")
        for name, value in grid.items():
            setattr(self, name, value)
        if self.timesteps is not None or self.sigmas is not None:
            self.steps = len(self.timesteps) if self.sigmas is None else len(self.sigmas) - 1

    @classmethod
    def of_options(cls, options, convention):
        """From SamplingOptions, in a pipeline's convention. Raises MindSigmaError for options that it does not take."""
        given = {name: getattr(options, name) for name in SAMPLER_OPTIONS if getattr(options, name) is not None}
        for name in given:
            if name not in cls.takes:
                own = f"it takes {', '.join(cls.takes)}" if cls.takes else "it has no options of its own"
                others = ", ".join(other for other in SAMPLERS if name in sampler_class(other).takes)
                raise MindSigmaError(f"{name} is for sampler {others}, not for {options.sampler}: {own}")
        return cls(convention=convention, **given)

    @property
    def graph(self):
        """What the graph of a step depends on: samplers for which it is equal share what is compiled."""
        return type(self), self.draws

    def only_of_diffusers(self, **options):
        """Raise MindSigmaError for an option that is given, if the convention is the official one."""
        for name, value in options.items():
            if value is not None and self.convention == "official":
                raise MindSigmaError(f"{name} is for convention diffusers; the official sampler has a grid of its own")

    def guide_channels(self, count):
        """Choose `guided_channels`; None is all, or those that the official ancestral sampler guides."""
        official = OFFICIALLY_GUIDED if self.convention == "official" else None
        self.guided_channels = official if count is None else whole("guided_channels", count)

    def checked_steps(self, num_steps, most=NUM_TRAIN_STEPS):
        """`num_steps`, if it is 1 ... `most` and that of timesteps or sigmas, if they are given."""
        num_steps = whole("num_inference_steps", num_steps, 1, most)
        if (self.timesteps is not None or self.sigmas is not None) and num_steps != self.steps:
            name = "timesteps" if self.sigmas is None else "sigmas"
            raise MindSigmaError(f"num_inference_steps {num_steps}: the {name} make {self.steps} steps; leave it out")
        return num_steps

    def table(self, num_steps, begin=0):
        """Rows, computed in float64, of the steps from `begin` on of `num_steps` steps.

        A multistep method has no history at `begin`. Raises MindSigmaError for steps that it cannot make.
        """
        raise NotImplementedError

    def start_scale(self, rows):
        """Factor of standard normal noise at the start of a whole trajectory, of which these are the rows."""
        return 1.0

    def start_history(self, shape):
        """Tuple of the `kept` latents before the first step, for latents of a shape."""
        return tuple(Tensor(np.zeros(shape, np.float32)) for _ in range(self.kept))

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """Advance the latents by one step.

        Args:
            latents: (N, c, h, w) fp32.
            history: tuple of `kept` (N, c, h, w) fp32, the newest first.
            numbers: of the step's Row: an fp32 tensor in a graph, else the numbers themselves.
            noise: (N, c, h, w) fp32, predicted, after guidance.
            variance: what the network predicts besides, (N, c, h, w) in its dtype, if `learned_variance`, else None.
            fresh: standard normal (N, c, h, w) fp32, if the sampler `draws`.

        Returns:
            latents and history after the step.
        """
        raise NotImplementedError

    def clean(self, row, before, after, history, fresh=None):
        """The clean latents that the network predicted in a step, from what came of it; here the latents after it.

        Outside of the graph, for who wants to look. All are float32 arrays (N, c, h, w).

        Args:
            row: the step's Row.
            before, after: latents.
            history: tuple of such, after the step.
            fresh: the step's noise, if the sampler `draws`.
        """
        return after


class LinearMultistep(Sampler):
    """Samplers whose step is a linear combination of the latents and of predictions of the clean latents.

    x0 = (latents - sigma * noise) / alpha, then latents = keep * latents + sum(weights * x0 history) + std * fresh.
    The numbers are alpha, sigma, keep, the weights (one more than `kept`, the newest first) and, if it `draws`, std.
    """

    @property
    def graph(self):
        """See Sampler."""
        return LinearMultistep, self.kept, self.draws

    def row(self, timestep, alpha, sigma, keep, weights, std=0.0):
        """Row of a step; weights that are missing are 0."""
        weights = tuple(weights) + (0.0,) * (1 + self.kept - len(weights))
        numbers = (alpha, sigma, keep, *weights) + ((std,) if self.draws else ())
        return Row(float(timestep), tuple(map(float, numbers)), float(alpha), float(sigma), std != 0)

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """One step, arguments and results of Sampler.construct; history: earlier predictions of the clean latents."""
        x0 = (latents - numbers[1] * noise) / numbers[0]
        latents = numbers[2] * latents + numbers[3] * x0
        for i in range(self.kept):
            latents = latents + numbers[4 + i] * history[i]
        if self.draws:
            latents = latents + numbers[4 + self.kept] * fresh
        return latents, ((x0,) + history)[: self.kept]

    def clean(self, row, before, after, history, fresh=None):
        """See Sampler."""
        if self.kept:
            return history[0]
        _, _, keep, weight, *std = row.numbers
        return (after - keep * before - (std[0] * fresh if self.draws else 0.0)) / weight


class PredictorCorrector(Sampler):
    """Samplers that predict the end of an interval and correct it once the network was asked there: one call a step.

    A step corrects where the interval before it ended, then predicts the end of its own. What an interval owes to its
    start and its noise, and not to predictions, is the same in both and is kept as `part`:

    start = a * latents + b * part + sum(weights * x0 history), then part = keep * start + std * fresh, then
    latents = part + sum(weights * x0 history).

    History is the part and earlier predictions, the newest first. The numbers are alpha, sigma, a, b, the corrector's
    weights, one for each prediction from x0 on, keep, std and the predictor's weights.
    """

    @property
    def graph(self):
        """See Sampler."""
        return PredictorCorrector, self.kept, self.draws

    def row(self, timestep, alpha, sigma, corrector, part, predictor):
        """Row of a step.

        Args:
            corrector: weights of x0 and of earlier ones; None: latents are the start.
            part: keep and std.
            predictor: weights of x0 and of earlier ones; in both those that are missing are 0.
        """
        start = (1.0, 0.0) if corrector is None else (0.0, 1.0)
        weights = [list(one or ()) + [0.0] * (self.kept - len(one or ())) for one in (corrector, predictor)]
        numbers = alpha, sigma, *start, *weights[0], *part, *weights[1]
        return Row(float(timestep), tuple(map(float, numbers)), float(alpha), float(sigma), part[1] != 0)

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """One step, arguments and results of Sampler.construct."""
        kept = self.kept
        x0 = (latents - numbers[1] * noise) / numbers[0]
        predictions = (x0,) + history[1:]
        start = numbers[2] * latents + numbers[3] * history[0]
        for i in range(kept):
            start = start + numbers[4 + i] * predictions[i]
        part = numbers[4 + kept] * start
        if self.draws:
            part = part + numbers[5 + kept] * fresh
        latents = part
        for i in range(kept):
            latents = latents + numbers[6 + kept + i] * predictions[i]
        return latents, ((part,) + predictions)[:kept]

    def clean(self, row, before, after, history, fresh=None):
        """See Sampler."""
        return history[1]

"""One step from noise to the clean latents, for models distilled to that by DMD (arXiv 2311.18828)."""

from mindsigma.arguments import whole
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.grids import at_timesteps, checked_timesteps
from mindsigma.sampling.sampler import LinearMultistep

TRAINED_AT = 400.0  # PixArt's DMD model


class OneStep(LinearMultistep):
    """The clean latents that the network predicts from unit noise at one timestep.

    Args:
        timesteps: the one timestep, that of the distillation; default 400.
        convention: the sampler is the same in both.
    """

    takes = ("timesteps",)
    steps = 1
    guidance = 1.0  # it was distilled with guidance

    def __init__(self, timesteps=None, convention="diffusers"):
        super().__init__(convention, timesteps=checked_timesteps(timesteps or (TRAINED_AT,)))
        if len(self.timesteps) > 1:
            raise MindSigmaError(f"sampler one-step takes one of timesteps, not {len(self.timesteps)}")

    def table(self, num_steps, begin=0):
        """See Sampler."""
        whole("num_inference_steps of sampler one-step", num_steps, 1, 1)
        grid = at_timesteps(self.timesteps)
        return [self.row(grid.timesteps[0], grid.alphas[0], grid.sigmas[0], 0.0, (1.0,))][begin:]

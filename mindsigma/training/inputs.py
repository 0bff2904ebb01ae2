"""From a batch of the loader to the inputs of a training step: latents, noise, timesteps, caption states.

All random numbers are keyed by the seed and the number of the draw, so that they do not depend on how many processes
share a batch or where a run was resumed.
"""

import numpy as np
from mindspore import Tensor

from mindsigma.choices import NULL_MASKS
from mindsigma.data import generator
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS
from mindsigma.training.loss import coefficients


class StepInputs:
    """Makes micro-batches.

    Args:
        vae_config: VAEConfig, for the scale of the latents.
        null_caption: (states (L, d) float32, number of its tokens) for dropped captions.
        loss: LossConfig.
        max_length: tokens that all captions are padded to.
        seed: int.
        null_mask: a dropped caption is attended to with the "caption"'s mask, as in the official training, or with its
            "own", as diffusers samples.
        vae, text_encoder: VAE and TextEncoder where batches hold images, else None.
        micro_condition: whether the network takes size and aspect ratio.
    """

    def __init__(
        self,
        vae_config,
        null_caption,
        loss,
        max_length,
        seed,
        null_mask="caption",
        vae=None,
        text_encoder=None,
        micro_condition=False,
    ):
        if null_mask not in NULL_MASKS:
            raise MindSigmaError(f"null_mask must be one of {', '.join(NULL_MASKS)}, not {null_mask!r}")
        self.vae_config, self.loss, self.seed, self.max_length = vae_config, loss, seed, max_length
        self.null_mask, self.vae, self.text_encoder = null_mask, vae, text_encoder
        self.micro_condition = micro_condition
        states, tokens = null_caption
        self.null_states = np.zeros((max_length, states.shape[1]), np.float32)
        self.null_states[: min(max_length, len(states))] = states[:max_length]
        self.null_tokens = min(tokens, max_length)

    def micro_batches(self, batch, count, weight=1.0):
        """The rows of a Batch as `count` micro-batches: tuples of tensors as TrainingStep takes them.

        `weight`: of these rows in the loss.
        """
        rows = len(batch.draws)
        if rows % count:
            raise MindSigmaError(f"{rows} rows cannot be shared equally by {count} micro-batches")
        size = rows // count
        return [self._inputs(batch, slice(i * size, (i + 1) * size), weight) for i in range(count)]

    def _inputs(self, batch, rows, weight):
        draws = batch.draws[rows]
        timestep = np.array([generator(self.seed, "timestep", draw).integers(NUM_TRAIN_STEPS) for draw in draws])
        clean = self.latents(batch, rows)
        states, mask = self.captions(batch, rows)
        for row in np.flatnonzero(batch.dropped[rows]):
            states[row] = self.null_states
            if self.null_mask == "own":
                mask[row] = np.arange(self.max_length) < self.null_tokens
        return self._tensors(batch, rows, clean, timestep, states, mask, weight)

    def _tensors(self, batch, rows, clean, timestep, states, mask, weight=1.0):
        noise = np.stack([self._normal("noise", draw, clean.shape[1:]) for draw in batch.draws[rows]])
        arrays = [clean, noise, coefficients(timestep, self.loss, weight), timestep.astype(np.float32), states, mask]
        if self.micro_condition:
            arrays += [batch.image_size[rows], batch.aspect_ratio[rows]]
        return tuple(Tensor(np.ascontiguousarray(array)) for array in arrays)

    def fixed(self, batch, timesteps):
        """Iterate over inputs of a whole Batch, one for each int array (n,) of `timesteps`; no caption is dropped."""
        rows = slice(0, len(batch.draws))
        clean = self.latents(batch, rows)
        states, mask = self.captions(batch, rows)
        for timestep in timesteps:
            yield self._tensors(batch, rows, clean, np.asarray(timestep), states, mask)

    def latents(self, batch, rows):
        """Scaled latents, float32 (n, c, h, w), drawn from the VAE's posterior."""
        if batch.moments is not None:
            mean, deviation = np.split(batch.moments[rows], 2, axis=1)
        else:
            # One image at a time: the encoder's activations are many times the DiT's.
            moments = [self.vae.encode(Tensor(batch.images[i : i + 1])).asnumpy() for i in range(rows.start, rows.stop)]
            mean, log_variance = np.split(np.concatenate(moments).astype(np.float32), 2, axis=1)
            deviation = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))
        noise = np.stack([self._normal("posterior", draw, mean.shape[1:]) for draw in batch.draws[rows]])
        return (mean + deviation * noise - self.vae_config.shift_factor) * self.vae_config.scaling_factor

    def captions(self, batch, rows):
        """T5's states, float32 (n, max_length, d), zero behind the caption, and mask int32 (n, max_length)."""
        if batch.states is not None:
            return batch.states[rows].copy(), batch.mask[rows].copy()
        encoded = self.text_encoder([text.strip() for text in batch.captions[rows]], self.max_length)
        found, marks = encoded.states.asnumpy().astype(np.float32), encoded.mask.asnumpy()
        states = np.zeros((len(found), *self.null_states.shape), np.float32)
        mask = np.zeros((len(found), self.max_length), np.int32)
        states[:, : found.shape[1]] = found * marks[:, :, None]
        mask[:, : found.shape[1]] = marks
        return states, mask

    def _normal(self, purpose, draw, shape):
        return generator(self.seed, purpose, draw).standard_normal(shape, np.float32)

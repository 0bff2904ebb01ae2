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
        loss: LossConfig; of a subclass, what describes its loss.
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
        self.null_kept = (np.arange(max_length) < tokens).astype(np.int32)

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
        timestep = self.timesteps(batch.draws[rows])
        states, mask = self.captions(batch, rows)
        for row in np.flatnonzero(batch.dropped[rows]):
            states[row] = self.null_states
            if self.null_mask == "own":
                mask[row] = self.null_kept
        return self.tensors(batch, rows, self.latents(batch, rows), timestep, (states, mask), weight)

    def timesteps(self, draws):
        """int64 (n,) for the numbers of draws."""
        return np.array([generator(self.seed, "timestep", draw).integers(NUM_TRAIN_STEPS) for draw in draws])

    def tensors(self, batch, rows, clean, timestep, text, weight=1.0):
        """What the objective takes, from arrays.

        Args:
            batch, rows: Batch and the slice of its rows.
            clean: scaled latents (n, c, h, w).
            timestep: int (n,).
            text: caption's states and mask.
            weight: of these rows in the loss.
        """
        noise = self.normal("noise", batch.draws[rows], clean.shape[1:])
        numbers = coefficients(timestep, self.loss, weight)
        arrays = clean, noise, numbers, timestep.astype(np.float32), *text
        return (*map(tensor, arrays), *self.conditions(batch, rows))

    def conditions(self, batch, rows):
        """Tuple of the micro conditions of rows; empty for a network that takes none."""
        if not self.micro_condition:
            return ()
        return tensor(batch.image_size[rows]), tensor(batch.aspect_ratio[rows])

    def null_of(self, text):
        """Null caption (1, L, d) and the mask (n, L) that it has beside the captions `text`."""
        mask = text[1] if self.null_mask == "caption" else np.broadcast_to(self.null_kept, text[1].shape)
        return tensor(self.null_states[None]), tensor(mask)

    def fixed(self, batch, timesteps):
        """Iterate over inputs of a whole Batch, one for each int array (n,) of `timesteps`; no caption is dropped."""
        rows = slice(0, len(batch.draws))
        clean, text = self.latents(batch, rows), self.captions(batch, rows)
        for timestep in timesteps:
            yield self.tensors(batch, rows, clean, np.asarray(timestep), text)

    def latents(self, batch, rows):
        """Scaled latents, float32 (n, c, h, w), drawn from the VAE's posterior."""
        return self.drawn_latents(batch.moments, batch.images, batch.draws, rows, "posterior")

    def drawn_latents(self, moments, images, draws, rows, purpose):
        """Scaled latents (n, c, h, w) of the rows of a Batch's moments or, where these are None, of its images."""
        if moments is not None:
            mean, deviation = np.split(moments[rows], 2, axis=1)
        else:
            # One image at a time: the encoder's activations are many times the DiT's.
            found = [self.vae.encode(Tensor(images[i : i + 1])).asnumpy() for i in range(rows.start, rows.stop)]
            mean, log_variance = np.split(np.concatenate(found).astype(np.float32), 2, axis=1)
            deviation = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))
        noise = self.normal(purpose, draws[rows], mean.shape[1:])
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

    def normal(self, purpose, draws, shape):
        """Standard normal float32 (n, *shape), each row from the number of its draw."""
        return np.stack([generator(self.seed, purpose, draw).standard_normal(shape, np.float32) for draw in draws])


def tensor(array):
    """A Tensor of an array of any layout."""
    return Tensor(np.ascontiguousarray(array))

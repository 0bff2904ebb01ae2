"""Refusals of what a DiT cannot take, of shapes alone: constants of a graph."""

from mindspore import ops

from mindsigma.errors import MindSigmaError


@ops.constexpr
def check_latents(config, shape):
    """Raise MindSigmaError for shapes of latents that the model cannot take."""
    p, side = config.patch_size, config.input_size
    if len(shape) != 4 or shape[1] != config.in_channels:
        raise MindSigmaError(f"latents of shape {tuple(shape)}: expected (N, {config.in_channels}, h, w)")
    if shape[2] % p or shape[3] % p:
        raise MindSigmaError(f"latents of {shape[2]} x {shape[3]}: both sides must be multiples of {p}")
    if not config.multi_scale and tuple(shape[2:]) != (side, side):
        raise MindSigmaError(
            f"latents of {shape[2]} x {shape[3]}: this single-scale model takes {side} x {side}; "
            "multi_scale=True allows other sizes"
        )
    rows, columns = shape[2] // p, shape[3] // p
    compression = config.kv_compression
    if compression is not None:
        smallest = rows * columns if compression.sampling == "uniform_every" else min(rows, columns)
        if smallest < compression.factor:
            raise MindSigmaError(f"latents of {shape[2]} x {shape[3]} are too small for {compression}")


@ops.constexpr
def check_timestep(config, shape, batch, has_micro_condition):
    """Raise MindSigmaError for a timestep that is not one for each of the latents, or for missing conditions."""
    if len(shape) != 1 or shape[0] != batch:
        raise MindSigmaError(f"timestep of shape {tuple(shape)}: expected ({batch},), one for each of the latents")
    if config.micro_condition and not has_micro_condition:
        raise MindSigmaError("this model needs image_size and aspect_ratio (micro_condition)")


@ops.constexpr
def check_modulation(shape, batch):
    """Raise MindSigmaError for modulation that is neither one for each of the latents nor one for all."""
    if shape[0] not in (1, batch):
        raise MindSigmaError(
            f"modulation of shape {tuple(shape)} for {batch} latents: expected one for each, or one for all; "
            "image_size and aspect_ratio are one for each timestep, or one for all"
        )


@ops.constexpr
def check_caption(config, shape, mask):
    """Raise MindSigmaError for shapes of a caption and its mask that the model cannot take."""
    if len(shape) != 3 or shape[2] != config.caption_channels:
        raise MindSigmaError(f"caption of shape {tuple(shape)}: expected (N, L, {config.caption_channels})")
    if mask is not None and tuple(mask) != tuple(shape[:2]):
        raise MindSigmaError(f"caption_mask of shape {tuple(mask)}: expected {tuple(shape[:2])}")


@ops.constexpr
def check_condition(latents, condition):
    """Raise MindSigmaError for a condition whose shape is not that of the latents, or of one of them."""
    if tuple(condition) not in (tuple(latents), (1,) + tuple(latents[1:])):
        raise MindSigmaError(
            f"condition of shape {tuple(condition)}: expected {tuple(latents)}, that of the latents, or one for all"
        )

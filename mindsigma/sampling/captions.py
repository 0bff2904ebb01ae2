"""Captions on their way from the text encoder to the DiT."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindsigma.arguments import array, texts_of
from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import narrow, split
from mindsigma.sampling.finite_latents import require_finite


@dataclass
class Caption:
    """T5 states (N, L, d) fp32 and mask (N, L) int32, 1 for tokens; L is a bucket and not the model's maximum."""

    states: Tensor
    mask: Tensor


def given_caption(name, states, mask):
    """Caption from embeddings that the caller computed, or None."""
    if states is None:
        return None
    states = states if isinstance(states, Tensor) else Tensor(array(f"{name}_embeds", states).astype(np.float32))
    mask = mask if mask is None else array(f"{name}_mask", mask, "biuf")
    if mask is None or len(states.shape) != 3 or mask.shape != tuple(states.shape[:2]) or 0 in states.shape:
        raise MindSigmaError(f"{name}_embeds (N, L, d) needs {name}_mask (N, L)")
    require_finite(f"{name}_embeds", states, "encode the text in fp32 or bf16: T5 overflows half precision")
    return Caption(states.astype(ms.float32), Tensor(mask.astype(np.int32)))


def pad(caption, length):
    """Lengthen a Caption with masked zeros."""
    if caption is None or caption.states.shape[1] == length:
        return caption
    batch, tokens, channels = caption.states.shape
    missing = length - tokens
    states = ops.concat((caption.states, ops.zeros((batch, missing, channels), caption.states.dtype)), 1)
    return Caption(states, ops.concat((caption.mask, ops.zeros((batch, missing), caption.mask.dtype)), 1))


def repeat_rows(tensor, count):
    """(1, ...) to (count, ...); (count, ...) as it is."""
    return tensor if tensor.shape[0] == count else ops.broadcast_to(tensor, (count,) + tensor.shape[1:])


def each(caption, times):
    """Every caption `times` times in a row."""
    if times == 1:
        return caption
    index = Tensor(np.repeat(np.arange(caption.states.shape[0]), times).astype(np.int32))
    return Caption(ops.gather(caption.states, index, 0), ops.gather(caption.mask, index, 0))


def caption_pair(encode, width, prompt, given, negative_prompt, given_negative, guided, max_length):
    """Caption of the prompts and, if guided, of the negative prompts, of one length.

    Args:
        encode: function (texts, max_length, min_length) -> Caption.
        width: channels that the DiT takes.
        prompt, given: texts, or a Caption that stands for them.
        negative_prompt, given_negative: likewise.
        max_length: tokens at which texts are cut.

    Returns:
        (Caption, Caption or None).
    """
    if given is not None and prompt is not None:
        raise MindSigmaError("give either prompt or prompt_embeds, not both")
    prompts = [] if given is not None else texts_of("prompt", prompt)
    count = len(prompts) if given is None else given.states.shape[0]
    negatives = []
    if guided and given_negative is None:
        negatives = texts_of("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negatives) not in (1, count):
            raise MindSigmaError(f"{len(negatives)} negative prompts for {count} prompts; give one, or one for each")
    ready = {"prompt": (given, (count,)), "negative_prompt": (given_negative, (1, count))}
    for name, (caption, rows) in ready.items():
        if caption is not None and (caption.states.shape[0] not in rows or caption.states.shape[2] != width):
            raise MindSigmaError(f"{name}_embeds of shape {caption.states.shape}: expected ({rows[-1]}, L, {width})")
    lengths = [caption.states.shape[1] for caption, _ in ready.values() if caption is not None]
    caption, negative = given, given_negative
    if prompts or negatives:
        encoded = encode(prompts + negatives, max([max_length, *lengths]), max([1, *lengths]))
        lengths.append(encoded.states.shape[1])
        if given is None:
            caption = Caption(narrow(encoded.states, 0, 0, count), narrow(encoded.mask, 0, 0, count))
        if negatives:
            start, rest = len(prompts), len(negatives)
            negative = Caption(narrow(encoded.states, 0, start, rest), narrow(encoded.mask, 0, start, rest))
    length = max(lengths)
    return pad(caption, length), pad(negative, length) if guided else None


def conditional_text_kv(text_kv, halves):
    """The conditional half of what `DiT.text_kv` gave for both; halves: it is a pair, one result for each."""
    if halves:
        return text_kv[1]
    return tuple((split(k, 2, 0)[1], split(v, 2, 0)[1]) for k, v in text_kv)

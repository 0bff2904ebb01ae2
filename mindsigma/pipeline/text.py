"""Prompts to caption states: tokens, lengths in few buckets, T5."""

from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.models.t5 import T5Encoder
from mindsigma.pipeline.compiling import compiling
from mindsigma.progress import DELAY_SECONDS, bar
from mindsigma.sampling.captions import Caption

PAD = 0
WORTH_A_BAR = 1e8  # numbers of T5's MLPs

# Token counts that captions are padded to. Fewer lengths mean fewer compilations; the mask makes padding exact.
LENGTH_BUCKETS = (16, 32, 64, 128, 192, 256)


def bucket_length(length, max_length):
    """Smallest bucket that holds `length` tokens, at most max_length."""
    return min([bucket for bucket in LENGTH_BUCKETS if bucket >= length] + [max_length])


@contextmanager
def layers_shown(encoder):
    """Around a call of a large T5Encoder: a bar over its layers, where they are computed one by one."""
    config = encoder.config
    large = config.num_layers * config.d_model * config.d_ff > WORTH_A_BAR
    if not large or not isinstance(encoder, T5Encoder) or ms.get_context("mode") == ms.GRAPH_MODE:
        yield
        return
    with bar(config.num_layers, "T5", "layer", delay=DELAY_SECONDS) as done:
        hooks = [block.register_forward_hook(lambda *_: done.update() and None) for block in encoder.encoder.block]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class TextEncoder:
    """Tokenizer and T5 encoder together.

    Args:
        tokenizer: Tokenizer.
        encoder: T5Encoder.
    """

    def __init__(self, tokenizer, encoder):
        self.tokenizer = tokenizer
        self.encoder = encoder

    def __call__(self, texts, max_length, min_length=1):
        """Encode texts to a Caption, padded to the bucket of the longest (of at least min_length tokens)."""
        rows = self.tokenizer.encode(texts, max_length)
        largest, known = max(max(row) for row in rows), self.encoder.config.vocab_size
        if largest >= known:
            raise MindSigmaError(
                f"{self.tokenizer.path}: gives the token {largest}, but T5 has {known}; they do not belong together"
            )
        length = bucket_length(max(min_length, *(len(row) for row in rows)), max_length)
        ids = np.full((len(rows), length), PAD, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        mask = Tensor(mask)
        layers, (texts, tokens) = self.encoder.config.num_layers, ids.shape
        with layers_shown(self.encoder), compiling(f"T5 of {layers} layers, {texts} x {tokens} tokens"):
            return Caption(self.encoder(Tensor(ids), mask), mask)

    def empty_prompt(self, length):
        """T5's states of the empty prompt, float32 (length, d_model), and the number of its tokens."""
        caption = self([""], length, min_length=length)
        return caption.states.asnumpy()[0].astype(np.float32), int(caption.mask.asnumpy()[0].sum())

"""Prompts to caption states: tokens, lengths in few buckets, T5."""

import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.sampling.captions import Caption

PAD = 0

# Token counts that captions are padded to. Fewer lengths mean fewer compilations; the mask makes padding exact.
LENGTH_BUCKETS = (16, 32, 64, 128, 192, 256)


def bucket_length(length, max_length):
    """Smallest bucket that holds `length` tokens, at most max_length."""
    return min([bucket for bucket in LENGTH_BUCKETS if bucket >= length] + [max_length])


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
        return Caption(self.encoder(Tensor(ids), mask), mask)

    def empty_prompt(self, length):
        """T5's states of the empty prompt, float32 (length, d_model), and the number of its tokens."""
        caption = self([""], length, min_length=length)
        return caption.states.asnumpy()[0].astype(np.float32), int(caption.mask.asnumpy()[0].sum())

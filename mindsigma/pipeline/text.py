"""Prompts to caption states: tokens, lengths in few buckets, T5."""

import warnings
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.captions import Caption

PAD, EOS = 0, 1
MAX_BYTES = 2**26  # of a vocabulary; T5's has 0.8 MB

# Token counts that captions are padded to. Fewer lengths mean fewer compilations; the mask makes padding exact.
LENGTH_BUCKETS = (16, 32, 64, 128, 192, 256)


def bucket_length(length, max_length):
    """Smallest bucket that holds `length` tokens, at most max_length."""
    return min([bucket for bucket in LENGTH_BUCKETS if bucket >= length] + [max_length])


class Tokenizer:
    """T5's sentencepiece vocabulary.

    Args:
        path: spiece.model or the folder that holds it.
    """

    def __init__(self, path):
        import sentencepiece

        path = Path(path)
        self.path = path / "spiece.model" if path.is_dir() else path
        if not self.path.is_file():
            raise MindSigmaError(f"{self.path}: no such file; the tokenizer folder must hold spiece.model")
        size = self.path.stat().st_size
        if size > MAX_BYTES:
            raise MindSigmaError(f"{self.path}: {size} bytes are too many for a tokenizer; download it again")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise MindSigmaError(f"{self.path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None

    def encode(self, texts, max_length):
        """List of token id lists, each closed by the end token; longer ones are cut with a warning that shows where."""
        rows = []
        for text in texts:
            ids = self._pieces.encode(text)
            if len(ids) > max_length - 1:
                lost = self._pieces.decode(ids[max_length - 1 :])
                warnings.warn(
                    f"the prompt has {len(ids) + 1} tokens, the limit is {max_length}; cut off: {lost!r}", stacklevel=2
                )
                ids = ids[: max_length - 1]
            rows.append(ids + [EOS])
        return rows


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

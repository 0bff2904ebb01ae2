"""Captions of many texts, encoded a few at a time and kept in a file: memory does not grow with their number."""

import tempfile
import warnings

import numpy as np

from mindsigma.pipeline.text import bucket_length
from mindsigma.weights.loading import PendingStreamed

TOKENS_AT_ONCE = 1024  # of the texts that T5 encodes together, padding included
STREAMED_AT_ONCE = 4096  # where its weights are read anew each time
IN_MEMORY = 8 << 20  # bytes of states that are held before the file is used


class KeptCaptions:
    """Encodes texts once each and gives their states back in any order.

    Args:
        pipeline: PixArtSigmaPipeline.
        max_length: tokens at which texts are cut; clean: clean them as web captions.
    """

    def __init__(self, pipeline, max_length=300, clean=False):
        self._pipeline, self._max_length, self._clean = pipeline, max_length, clean
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)
        self._places, self._negative = {}, None  # text: (offset, shape of the states, mask)

    @property
    def negative(self):
        """KeptCaptions of the negative prompts, which are kept apart: they may be longer than their own tokens."""
        if self._negative is None:
            self._negative = KeptCaptions(self._pipeline, self._max_length, self._clean)
        return self._negative

    @property
    def longest(self):
        """Tokens of the longest text, padded."""
        return max((shape[0] for _, shape, _ in self._places.values()), default=1)

    def encode(self, texts, whole=0, progress=None):
        """Encode those of the texts that are not there yet.

        Args:
            whole: of each text keep so many tokens at least, padding included, instead of its own tokens alone.
            progress: called with the number of texts that were encoded.
        """
        texts = [text for text in dict.fromkeys(texts) if text not in self._places]
        for some in self._together(texts, whole):
            caption = self._pipeline.encode_prompts(some, self._max_length, self._clean, max(whole, 1))
            states, masks = caption.states.asnumpy(), caption.mask.asnumpy()
            for text, rows, mask in zip(some, states, masks):
                self._keep(text, rows, mask, whole)
            if progress is not None:
                progress(len(some))

    def _together(self, texts, whole):
        """The texts in lists, each of few enough tokens and of neighbours, or of one text."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who encodes them tells of those that are cut
            lengths = [len(row) for row in self._pipeline.tokenizer.encode(texts, self._max_length)] if texts else []
        streamed = isinstance(self._pipeline.components.opened("t5"), PendingStreamed)
        most = STREAMED_AT_ONCE if streamed else TOKENS_AT_ONCE
        some, longest = [], 0
        for text, length in zip(texts, lengths):
            length = max(bucket_length(length, self._max_length), whole)
            if some and max(longest, length) * (len(some) + 1) > most:
                yield some
                some, longest = [], 0
            some.append(text)
            longest = max(longest, length)
        if some:
            yield some

    def _keep(self, text, states, mask, whole):
        length = max(int(mask.sum()), whole)
        place = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(states[:length], np.float32).tobytes())
        self._places[text] = (place, (length, states.shape[1]), mask[:length].astype(np.int32))

    def batch(self, texts):
        """States, float32 (N, L, d), and mask, int32 (N, L), of texts; L is the bucket of the longest."""
        places = [self._places[text] for text in texts]
        longest = max(shape[0] for _, shape, _ in places)
        length = max(longest, bucket_length(longest, self._max_length))
        states = np.zeros((len(texts), length, places[0][1][1]), np.float32)
        masks = np.zeros((len(texts), length), np.int32)
        for row, (place, shape, mask) in enumerate(places):
            self._file.seek(place)
            data = self._file.read(4 * shape[0] * shape[1])
            states[row, : shape[0]] = np.frombuffer(data, np.float32).reshape(shape)
            masks[row, : shape[0]] = mask
        return states, masks

"""T5's vocabulary: texts to token ids."""

import warnings
from pathlib import Path

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import read_bytes
from mindsigma.weights.formats.weight_files import file_in_folder
from mindsigma.weights.tokenizer_json import encode_with, load_tokenizer_json

EOS = 1
MAX_BYTES = 2**26  # of a vocabulary; T5's has 0.8 MB
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")


class Tokenizer:
    """T5's vocabulary: sentencepiece's spiece.model, or the tokenizer.json that transformers 5 writes in its place.

    Args:
        path: one of the two files, or the folder that holds one. Where it holds both, spiece.model is read.

    Attributes:
        path: the file that was read.
    """

    def __init__(self, path):
        self.path = tokenizer_file(path)
        if self.path.suffix == ".json":
            pieces = load_tokenizer_json(self.path, EOS)
            self._encode, self._decode = lambda text: encode_with(pieces, self.path, text), pieces.decode
        else:
            pieces = self._sentencepiece()
            self._encode, self._decode = pieces.encode, pieces.decode

    def _sentencepiece(self):
        import sentencepiece

        content = read_bytes(self.path, MAX_BYTES)
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise MindSigmaError(f"{self.path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None

    def encode(self, texts, max_length):
        """List of token id lists, each closed by the end token; longer ones are cut with a warning that shows where."""
        rows = []
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise MindSigmaError(
                    f"the prompt {one_line(repr(text))} is not Unicode text (a lone surrogate)"
                ) from None
            ids = self._encode(text)
            if len(ids) > max_length - 1:
                lost = self._decode(ids[max_length - 1 :])
                warnings.warn(
                    f"the prompt has {len(ids) + 1} tokens, the limit is {max_length}; cut off: {lost!r}", stacklevel=2
                )
                ids = ids[: max_length - 1]
            rows.append(ids + [EOS])
        return rows


def tokenizer_file(path):
    """Path of the file that a Tokenizer of a folder, or of the file itself, reads. Raises MindSigmaError."""
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise MindSigmaError(
                f"{path}: no such file; a tokenizer is {' or '.join(TOKENIZER_FILES)}, or their folder"
            )
        return path
    for name in TOKENIZER_FILES:
        if (path / name).exists():
            return file_in_folder(path, name)
    raise MindSigmaError(f"{path}: the tokenizer folder must hold {' or '.join(TOKENIZER_FILES)}")

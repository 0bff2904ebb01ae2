"""CLIP's features and scores, by mindone's CLIPModel: images and prompts into one space, and the angle between them.

A score is told with its model and its definition. TextAtlas: the mean cosine of ViT-B/32. PixArt's papers and Sana: 100
times the cosine. torchmetrics: that mean, at least 0. Hessel et al. 2021: 2.5 times the mean of the positive parts.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters
from PIL import Image

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.evaluation.resizing import resized
from mindsigma.evaluation.weights import model_folder
from mindsigma.extras import extra
from mindsigma.foreign import understanding
from mindsigma.runtime import device
from mindsigma.weights.formats.reader import open_checkpoint
from mindsigma.weights.tensors import weight_tensor

CUTS = ("truncated", "sliced")  # of prompts that are too long: the end token kept, or lost as in TextAtlas
FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer*.json", "special_tokens*")
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the channels, 0 ... 1
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there


class Clip:
    """A CLIP model with its tokenizer.

    Args:
        name_or_path: folder with config.json, weights, vocab.json and merges.txt, or a hub id such as
            openai/clip-vit-base-patch32.

    Attributes:
        name: what it was called.
        length: longest prompt in tokens, 77.
    """

    def __init__(self, name_or_path):
        models = extra("mindone.transformers", "CLIP")
        self._transformers = extra("transformers", "CLIP")
        self.name = str(name_or_path)
        self.folder = model_folder(name_or_path, FILES, WEIGHTS)
        with understanding(self.folder / "config.json"):
            config = self._transformers.CLIPConfig.from_pretrained(str(self.folder), local_files_only=True)
            with no_init_parameters():
                self.network = models.CLIPModel(config)
        self.length = config.text_config.max_position_embeddings
        self._image_size = config.vision_config.image_size
        self._load()
        if device() == "CPU":
            self._replace_patches(config.vision_config)
        self.network.set_train(False)
        self._tokenizer = None

    def _load(self):
        """Give the network its weights; names are Hugging Face's."""
        path = next(self.folder / name for name in WEIGHTS if (self.folder / name).is_file())
        source = open_checkpoint(path)
        for parameter in self.network.get_parameters():
            name = _stored_name(parameter.name)
            if name not in source or source.shape(name) != tuple(parameter.shape):
                found = f"is of shape {source.shape(name)}" if name in source else "is missing"
                raise MindSigmaError(
                    f"{path}: tensor '{name}' {found}, expected {tuple(parameter.shape)}; give the weights that belong "
                    "to its config.json"
                )
            parameter.set_data(weight_tensor(path, name, source.read(name), ms.float32))

    def _replace_patches(self, config):
        """mindone's convolution of patches has no kernel on a CPU; MindSpore's older one does the same."""
        embeddings = self.network.vision_model.embeddings
        conv = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, pad_mode="valid"
        )
        conv.weight.set_data(Tensor(embeddings.patch_embedding.weight.asnumpy()))
        embeddings.patch_embedding = conv

    def pixels(self, images):
        """float32 (N, 3, side, side) of PIL images; see `prepared`."""
        return np.stack([prepared(image, self._image_size) for image in images])

    def image_features(self, images):
        """float32 (N, d), not normalised, of PIL images."""
        return self.features_of_pixels(self.pixels(images))

    def features_of_pixels(self, pixels):
        """float32 (N, d) of `pixels`."""
        return self.network.get_image_features(pixel_values=Tensor(pixels, ms.float32)).asnumpy()

    def open_tokenizer(self):
        """The tokenizer; raises MindSigmaError where the folder has none."""
        if self._tokenizer is None:
            with understanding(self.folder):
                try:
                    self._tokenizer = self._transformers.CLIPTokenizerFast.from_pretrained(
                        str(self.folder), local_files_only=True
                    )
                except (OSError, TypeError) as error:
                    raise MindSigmaError(
                        f"{self.folder}: has no tokenizer ({one_line(str(error).strip())}); put CLIP's vocab.json and "
                        "merges.txt there"
                    ) from None
        return self._tokenizer

    def count_tokens(self, text):
        """Tokens of a text, start and end included, before it is cut."""
        return len(self._rows([text])[0])

    def _rows(self, texts):
        tokenizer = self.open_tokenizer()
        return [tokenizer(text, verbose=False)["input_ids"] for text in texts]

    def tokens(self, texts, cut="truncated"):
        """int64 ids and mask (N, 77) of texts; longer ones are cut as CUTS has it."""
        rows = self._rows(texts)
        ids = np.full((len(rows), self.length), self._tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            kept = cut_ids(row, self.length, cut)
            ids[i, : len(kept)], mask[i, : len(kept)] = kept, 1
        return ids, mask

    def text_features(self, texts, cut="truncated"):
        """float32 (N, d), not normalised, of texts."""
        return self.features_of_tokens(*self.tokens(texts, cut))

    def features_of_tokens(self, ids, mask):
        """float32 (N, d) of token ids (N, L) and their mask."""
        ids, mask = Tensor(ids, ms.int32), Tensor(mask, ms.int32)
        return self.network.get_text_features(input_ids=ids, attention_mask=mask).asnumpy()


def prepared(image, side):
    """float32 (3, side, side) of a PIL image as CLIP's processor has it: bicubic, the short side to `side`, centre."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = side * width // short, side * height // short
    image = resized(image, size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return ((pixels - MEAN) / DEVIATION).transpose(2, 0, 1).astype(np.float32)


def _stored_name(name):
    """Hugging Face's name of a parameter of MindSpore's cells."""
    for here, there in ((".gamma", ".weight"), (".beta", ".bias"), (".embedding_table", ".weight")):
        if name.endswith(here):
            return name[: -len(here)] + there
    return name


def cut_ids(row, length, cut):
    """The first `length` of a list of ids; "truncated" keeps the last, which is the end token."""
    if len(row) <= length:
        return row
    return row[:length] if cut == "sliced" else [*row[: length - 1], row[-1]]


def cosines(image_features, text_features):
    """float64 (N,): cosine of each image's features with those of its text."""
    image, text = (np.asarray(x, np.float64) for x in (image_features, text_features))
    return (image * text).sum(1) / (np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1))


def scores(mean, positive_mean):
    """dict of the scores by name, of the mean of the cosines and of that of their positive parts."""
    return {"cosine": mean, "torchmetrics": max(100 * mean, 0.0), "hessel": 2.5 * positive_mean}

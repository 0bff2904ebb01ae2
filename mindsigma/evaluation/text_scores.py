"""The text benchmark on pictures that are there: read, compared with their prompts, counted."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from mindsigma.data.images import cover_and_crop
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.evaluation.clip import CUTS, cosines
from mindsigma.evaluation.features import read_image
from mindsigma.evaluation.fid import frechet_distance
from mindsigma.evaluation.measurements import checksum, label
from mindsigma.evaluation.words import Counts, bootstrap, count, total
from mindsigma.pipeline.pictures import through_vae

SHUFFLES = 8  # other pictures' texts that each picture's is compared with, for the level of chance
QUANTITIES = ("f1", "accuracy", "cer")  # that get an interval


class FolderPictures:
    """Pictures of items in a folder, by subset and name; with one subset they may also lie in the folder itself."""

    def __init__(self, path, items):
        self.path = Path(path)
        if not self.path.is_dir():
            raise MindSigmaError(f"{self.path}: no such folder; give the pictures' folder")
        one = len({item.subset for item in items}) == 1
        self._flat = one and not any((self.path / item.subset).is_dir() for item in items[:1])

    def path_of(self, item):
        """Path of an item's picture."""
        return self.path / item.name if self._flat else self.path / item.subset / item.name

    def missing(self, items):
        """Those of the items that have no picture."""
        return [item for item in items if not self.path_of(item).is_file()]

    def read(self, item):
        """PIL image of an item; raises MindSigmaError."""
        return read_image(self.path_of(item))

    def checksum(self, item):
        """Checksum of an item's file; raises MindSigmaError."""
        return checksum(self.path_of(item))


class ReferencePictures:
    """The data set's own pictures: the ceiling of what the engine reads."""

    def __init__(self, data):
        self.data, self.path = data, data.path

    def missing(self, items):
        """Those of the items that have no picture."""
        return [item for item in items if item.reference is None]

    def read(self, item):
        """PIL image of an item; raises MindSigmaError."""
        return self.data.reference(item)

    def checksum(self, item):
        """What stands for an item's picture: they do not change."""
        return "reference"


class DecodedPictures(ReferencePictures):
    """The data set's own pictures, encoded and decoded by a VAE: the ceiling of any network of its latents.

    Args:
        data: TextAtlas.
        vae: VAE.
    """

    def __init__(self, data, vae):
        super().__init__(data)
        self.vae, digest = vae, hashlib.blake2b(digest_size=16)
        for parameter in vae.get_parameters():
            digest.update(parameter.asnumpy().tobytes())
        self._mark = f"reference through {digest.hexdigest()}"

    def read(self, item):
        """PIL image of an item, cut to multiples of 8 pixels; raises MindSigmaError."""
        picture = super().read(item)
        width, height = (max(8, side // 8 * 8) for side in picture.size)
        return through_vae(self.vae, cover_and_crop(picture, height, width, "bilinear"))

    def checksum(self, item):
        """What stands for an item's picture: it follows from the VAE's weights."""
        return self._mark


@dataclass
class Score:
    """What was found out about one item.

    Attributes:
        item: Item.
        text: what was read.
        counts: Counts.
        unreadable: why the picture could not be opened or read, or "".
        cosines: cosine with the prompt by how it is cut, "truncated" and "sliced"; empty without CLIP.
        tokens: of the prompt in CLIP's count; 0 without.
    """

    item: object
    text: str
    counts: Counts
    unreadable: str = ""
    cosines: dict = field(default_factory=dict)
    tokens: int = 0


def measure_texts(items, pictures, reader, measurements, done=lambda count: None):
    """Read each item's picture unless that was done; as in TextAtlas, nothing is read on one that does not open."""
    what = label(reader.about)
    for item in items:
        try:
            key = key_of(item), pictures.checksum(item), what
            if measurements.get(*key) is None:
                text, fault = reader.read(pictures.read(item))
                measurements.add(*key, {"text": text, "fault": fault})
        except MindSigmaError as error:
            measurements.add(key_of(item), "unreadable", what, {"text": "", "fault": one_line(error, 300)})
        done(1)


def measure_cosines(items, pictures, clip, measurements, batch=32, done=lambda count: None):
    """Compare each item's picture with its prompt by CLIP unless that was done."""
    what = clip_label(clip)
    waiting = []
    for item in items:
        try:
            key = key_of(item), pictures.checksum(item), what
            if measurements.get(*key) is None:
                waiting.append((key, item, pictures.read(item)))
        except MindSigmaError:
            pass  # left out of the mean, as in TextAtlas
        if len(waiting) == batch:
            _compare(waiting, clip, measurements)
            waiting = []
        done(1)
    if waiting:
        _compare(waiting, clip, measurements)


def _compare(waiting, clip, measurements):
    images = clip.image_features([image for _, _, image in waiting])
    prompts = [item.prompt for _, item, _ in waiting]
    found = {cut: cosines(images, clip.text_features(prompts, cut)) for cut in CUTS}
    for i, (key, item, _) in enumerate(waiting):
        value = {cut: float(found[cut][i]) for cut in CUTS}
        measurements.add(*key, {**value, "tokens": clip.count_tokens(item.prompt)})


def clip_label(clip):
    """What a cosine was measured with."""
    return label({"clip": clip.name})


def key_of(item):
    """What an item's picture is called among the measurements."""
    return f"{item.subset}/{item.name}"


def collect(items, pictures, measurements, reader=None, clip=None):
    """List of Score of the items, from what was measured."""
    scores = []
    for item in items:
        key, value, fault = key_of(item), None, ""
        try:
            mark = pictures.checksum(item)
        except MindSigmaError as error:
            mark, fault = "unreadable", one_line(error, 300)
        text = ""
        if reader is not None:
            value = measurements.get(key, mark, label(reader.about))
            value = value or measurements.get(key, "unreadable", label(reader.about)) or {}
            text, fault = value.get("text", ""), fault or value.get("fault", "")
        compared = measurements.get(key, mark, clip_label(clip)) if clip is not None else None
        score = Score(item, text, count(text, item.text), fault)
        if compared:
            score.cosines = {cut: compared[cut] for cut in CUTS}
            score.tokens = compared["tokens"]
        scores.append(score)
    return scores


def chance(scores):
    """Counts of the read texts against the texts of other pictures: what an F1 is by chance alone."""
    n = len(scores)
    shifts = sorted({round(n * i / (SHUFFLES + 1)) for i in range(1, SHUFFLES + 1)} - {0, n})
    return total(
        [count(score.text, scores[(i + shift) % n].item.text) for shift in shifts for i, score in enumerate(scores)]
    )


def summary(scores, statistics=None, longest=None):
    """dict of the figures of some pictures.

    Args:
        scores: list of Score.
        statistics: (generated, real) RunningStatistics for FID, or None.
        longest: CLIP's longest prompt in tokens, or None without CLIP.
    """
    counts = [score.counts for score in scores]
    whole, shuffled = total(counts), chance(scores)
    result = {
        "pictures": whole.pictures,
        "unreadable": sum(bool(score.unreadable) for score in scores),
        "empty_ground_truth": sum(not one.rated for one in counts),
        "hits": whole.hits,
        "read": whole.read,
        "wanted": whole.wanted,
        "accuracy": whole.accuracy,
        "precision": whole.precision,
        "f1": whole.f1,
        "cer": whole.cer,
        "exact": sum(score.text.split() == score.item.text.split() for score in scores),
        "f1_of_other_texts": shuffled.f1,
        "intervals_95": {name: list(bootstrap(counts, name)) for name in QUANTITIES},
    }
    compared = [score for score in scores if score.cosines]
    if longest is not None and compared:
        result["clip"] = {
            "pictures": len(compared),
            **{cut: sum(score.cosines[cut] for score in compared) / len(compared) for cut in CUTS},
            "prompts_too_long": sum(score.tokens > longest for score in compared),
        }
    if statistics is not None and min(one.count for one in statistics) > 1:
        made, real = (one.result() for one in statistics)
        result["fid"] = {"value": frechet_distance(made, real), "generated": made.count, "real": real.count}
    return result


def by_subset(scores, statistics=None, longest: Optional[int] = None):
    """dict of the `summary` of each subset, by name; `statistics`: dict by subset."""
    names = dict.fromkeys(score.item.subset for score in scores)
    return {
        name: summary([s for s in scores if s.item.subset == name], (statistics or {}).get(name), longest)
        for name in names
    }

"""How much of a text was read: hits of words, accuracy, precision, F1 and CER, exactly as TextAtlas counts them.

The counting is that of cal_ocr.py and cal_ocr_cer.py of CSU-JPG/TextAtlas (7b349b9). `Counts` add up, so that a subset
is counted over all its words, not as the mean of its pictures.
"""

from dataclasses import astuple, dataclass
from functools import cache

import numpy as np

from mindsigma.extras import extra

THRESHOLD = 80  # percent: a read word that agrees with a wanted one to so much is a hit


@dataclass(frozen=True)
class Counts:
    """Numbers of words of one picture or of many.

    Attributes:
        hits: read words that are wanted.
        read: words that were read.
        wanted: words of the ground truth.
        error: sum of the pictures' character error rates, over those whose ground truth is not empty.
        distance: sum of their Levenshtein distances.
        rated: number of those pictures.
        pictures: number of all.
    """

    hits: int = 0
    read: int = 0
    wanted: int = 0
    error: float = 0.0
    distance: int = 0
    rated: int = 0
    pictures: int = 0

    def __add__(self, other):
        return Counts(*(one + two for one, two in zip(astuple(self), astuple(other))))

    @property
    def accuracy(self):
        """Percent of the wanted words that were read: the recall."""
        return percent(self.hits, self.wanted)

    @property
    def precision(self):
        """Percent of the read words that were wanted."""
        return percent(self.hits, self.read)

    @property
    def f1(self):
        """Harmonic mean of precision and accuracy, in percent."""
        return f1_of(self.precision, self.accuracy)

    @property
    def cer(self):
        """Mean character error rate, 0 ... 1; 0 without a picture that has a ground truth."""
        return self.error / self.rated if self.rated else 0.0

    @property
    def mean_distance(self):
        """Mean Levenshtein distance in characters."""
        return self.distance / self.rated if self.rated else 0.0


def percent(part, whole):
    """100 part / whole; 0 where there is no whole."""
    return 100.0 * part / whole if whole else 0.0


def f1_of(precision, recall):
    """Harmonic mean of the two; 0 if both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def count(recognised, wanted):
    """Counts of one picture: text that was recognised on it, text that should be there."""
    read, words = words_of(recognised), words_of(wanted)
    distance, error, rated = 0, 0.0, 0
    if wanted != "":  # one of blanks alone counts
        distance = _distances().Levenshtein.distance(recognised, wanted)
        error, rated = distance / max(len(recognised), len(wanted)), 1
    return Counts(hits(read, words), len(read), len(words), error, distance, rated, 1)


def words_of(text):
    """Words of a text: lower case, separated by Unicode white space, punctuation left on."""
    return text.strip().lower().split()


def hits(read, wanted):
    """Number of read words that take a wanted one: each the first that is left and alike enough, in the read order.

    It is greedy, as the original is, so that the order of the read words may matter.
    """
    left, found = list(wanted), 0
    for word in read:
        for place, other in enumerate(left):
            if ratio(word, other) >= THRESHOLD:
                del left[place]
                found += 1
                break
    return found


def ratio(one, other):
    """Likeness of two texts in whole percent: 2 M / (both lengths), M the length of the longest common subsequence.

    As fuzzywuzzy 0.18 with Levenshtein has it: rounded, halves to even; 0 where one is empty and 100 where they are
    the same.
    """
    if one == other:
        return 100
    if not one or not other:
        return 0
    return int(round(100 * 2 * _distances().LCSseq.similarity(one, other) / (len(one) + len(other))))


@cache
def _distances():
    return extra("rapidfuzz.distance", "counting words")


def total(counts):
    """Sum of a list of Counts."""
    return sum(counts, Counts())


def bootstrap(counts, quantity="f1", samples=2000, level=0.95, seed=0):
    """Confidence interval (low, high) of a quantity of many pictures, drawn anew with replacement.

    Args:
        counts: list of Counts, one a picture.
        quantity: "f1", "accuracy", "precision" or "cer".
        samples: how often as many pictures are drawn.
        level: share of the samples within the interval.
    """
    table = np.array([(c.hits, c.read, c.wanted, c.error, c.rated) for c in counts], np.float64)  # (pictures, 5)
    if not len(table):
        return 0.0, 0.0
    random = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        found, read, wanted, error, rated = table[random.integers(len(table), size=len(table))].sum(0)
        drawn = Counts(found, read, wanted, error, 0, rated)
        values.append(getattr(drawn, quantity))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""What a recipe of training takes on many NPUs, on paper: bytes and link time a step, images a second, days.

Every figure is planned, none measured; ASSUMPTIONS says from what.
"""

from dataclasses import dataclass

import numpy as np
from mindspore.nn.utils import no_init_parameters

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import DiT
from mindsigma.models.dit_config import PRESETS

SERVER = 8  # cards that HCCS connects
PASSES = 4  # forward, forward again (--recompute), and two forwards' worth of arithmetic backward
LOW, HIGH = 0.25, 0.45  # parts of the peak of the matrix unit that a training step reaches

ASSUMPTIONS = f"""\
* Arithmetic of an image: half of the stored report of the guided step (two captions), times {PASSES}: forward, the
  blocks again (recompute), backward. Features are extracted beforehand; flash attention, not --fp32-attention.
* A step reaches {LOW:.0%} to {HIGH:.0%} of the card's fp16 peak (configs/npu.yaml). One guided step of mindone's
  example reached 11 % at 512 px, 26 % at 1024 px and 32 % at 2048 px, all at batch 1.
* Collectives go first among the {SERVER} cards of a server, by HCCS, then among cards of one number of all servers, by
  RoCE, at the full rate of configs/npu.yaml in each direction.
* The slow end of a range adds link time to arithmetic, the fast one hides the sums of gradients behind the backward
  pass.
* Loading, validation, checkpoints and stragglers cost nothing."""


@dataclass(frozen=True)
class Recipe:
    """A stage of training: configs/train/NAME.yaml.

    Attributes:
        name: of the file.
        report: name of the stored report of its guided step.
        batch: images of a card.
        steps: of the stage.
    """

    name: str
    report: str
    batch: int
    steps: int


RECIPES = (
    Recipe("512-MS", "xl-512-fp16", 48, 10_000),
    Recipe("1024-MS", "xl-1024-fp16", 12, 5_000),
    Recipe("1024-MS-KV", "xl-1024-kv-fp16", 16, 5_000),
    Recipe("2K-MS-KV", "xl-2048-kv-fp16", 4, 5_000),
    Recipe("4K-MS-KV", "xl-4096-kv-fp16", 1, 5_000),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave a card in one step, by the kind of link.

    Attributes:
        gradients, weights: (HCCS, RoCE) each.
    """

    gradients: tuple
    weights: tuple

    def seconds(self, npu, which=("gradients", "weights")):
        """Time of the links of an Npu, one after the other."""
        rates = npu.hccs_gbs, npu.roce_gbs
        return sum(sent / (rate * 1e9) for name in which for sent, rate in zip(getattr(self, name), rates) if sent)


def traffic(shapes, cards, zero, group=0):
    """Traffic of a network's weights, fp32 gradients and weights of two bytes, at a stage of ZeRO.

    A ring of n sends S (n - 1) / n to scatter or to gather S bytes; servers then share what each of their cards has.
    Weights that the cards of a group cannot divide (training/shares.py) are treated as at stage 0.

    Args:
        shapes: list of the weights' shapes.
        group: cards that divide among themselves, a divisor or a multiple of a server's; 0: all.
    """
    group = min(group or cards, cards)
    sizes = [int(np.prod(shape)) for shape in shapes]
    divided = sum(size for size, shape in zip(sizes, shapes) if zero and len(shape) == 2 and shape[0] % group == 0)
    everyone = (min(cards, SERVER), -(-cards // SERVER))  # cards of a server, servers
    inside = (min(group, SERVER), -(-group // SERVER))
    across = (everyone[0] // inside[0], everyone[1] // inside[1])  # of one place in each group
    whole = _ring(8 * (sum(sizes) - divided), *everyone)
    if zero < 2:
        gradients = _ring(8 * divided, *everyone)
    else:  # scattered in a group; at stage 3 in two bytes, as they are made
        gradients = _ring((2 if zero == 3 else 4) * divided, *inside)
        gradients = _both(gradients, _ring(8 * divided // group, *across))
    # At stage 3 weights are gathered in both passes.
    return Traffic(_both(gradients, whole), _ring((4 if zero == 3 else 2) * divided, *inside))


def _ring(sent, cards, servers):
    """(HCCS, RoCE): what a card sends, first among the cards of a server, then among servers."""
    return sent * (cards - 1) // cards, sent // cards * (servers - 1) // servers


def _both(one, other):
    return one[0] + other[0], one[1] + other[1]


@dataclass(frozen=True)
class Estimate:
    """A Recipe on so many cards.

    Attributes:
        batch: images a step of all cards.
        traffic: Traffic.
        links: seconds of all links a step.
        seconds: (fast, slow) of a step.
    """

    batch: int
    traffic: Traffic
    links: float
    seconds: tuple

    @property
    def images(self):
        """(slow, fast) images a second."""
        return self.batch / self.seconds[1], self.batch / self.seconds[0]

    def days(self, steps):
        """(fast, slow) days of so many steps."""
        return tuple(steps * seconds / 86400 for seconds in self.seconds)


def estimate(recipe, report, shapes, npu, cards, zero, group=0):
    """Estimate of a Recipe.

    Args:
        report: of its guided step (compare.read_report).
        shapes: of the network's weights.
        npu: Npu, of which fp16_tflops, hccs_gbs and roce_gbs are known.
        cards, zero, group: of `traffic`.
    """
    if None in (npu.fp16_tflops, npu.hccs_gbs, npu.roce_gbs):
        raise MindSigmaError(f"{npu.name}: fp16_tflops, hccs_gbs and roce_gbs must be known")
    arithmetic = recipe.batch * PASSES * report["flops"]["total"] / 2 / (npu.fp16_tflops * 1e12)
    sent = traffic(shapes, cards, zero, group)
    links, late = sent.seconds(npu), sent.seconds(npu, ("weights",))
    return Estimate(recipe.batch * cards, sent, links, (arithmetic / HIGH + late, arithmetic / LOW + links))


HEADER = "| recipe | cards | images a step | GB by HCCS, by RoCE | link time | step | images/s | days |"


def table(reports, cards, npu, zero, group=0):
    """Lines of a Markdown table of all RECIPES.

    Args:
        reports: function from a name to a stored report.
        cards: numbers of them.
        npu, zero, group: of `estimate`.
    """
    with no_init_parameters():
        dit = DiT(PRESETS["PixArt-Sigma-XL-2-512-MS"])
    shapes = [tuple(parameter.shape) for parameter in dit.get_parameters()]
    lines = [HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    for recipe in RECIPES:
        report = reports(recipe.report)
        lines += [_row(recipe, count, estimate(recipe, report, shapes, npu, count, zero, group)) for count in cards]
    return lines


def _row(recipe, cards, found):
    hccs, roce = (sum(parts) / 1e9 for parts in zip(found.traffic.gradients, found.traffic.weights))
    (fast, slow), images, days = found.seconds, found.images, found.days(recipe.steps)
    cells = (
        recipe.name,
        str(cards),
        f"{found.batch:,}",
        f"{hccs:.1f}, {roce:.2f}",
        f"{found.links * 1e3:.0f} ms",
        f"{fast:.1f} to {slow:.1f} s",
        f"{_rounded(images[0])} to {_rounded(images[1])}",
        f"{days[0]:.1f} to {days[1]:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _rounded(value):
    """Two digits of an estimate."""
    return f"{float(f'{value:.2g}'):,.10g}"

"""Sampling by several processes: each predicts a part of the noise, bands of rows and halves of guidance.

A process holds the tokens of its band through the whole DiT; in self-attention the keys and values of all bands are
gathered, after their compression. The predicted noise is gathered once a step; guidance and solver, which cost next to
nothing, are computed by all, so that every process has the whole latents after every step.
"""

from dataclasses import dataclass
from math import gcd
from typing import Tuple

from mindspore import Tensor, nn, ops

from mindsigma.arguments import one_of
from mindsigma.distributed import Collectives, join_ranks
from mindsigma.errors import MindSigmaError
from mindsigma.ops.heads import head_width
from mindsigma.sampling.captions import Caption
from mindsigma.sampling.denoising import DenoisingGraphs, guide, scalars, variance_of
from mindsigma.sampling.perturbed import PerturbedDiT
from mindsigma.sampling.shortcuts import PLAIN

MODES = ("sequence", "cfg", "both")
NOT_GUESSED = "guess_mode (--guess-mode) controls one half of guidance alone: take parallel sequence, or one process"
NOT_HALVED = "pag_scale (--pag-scale) makes more than two halves of guidance: take parallel sequence, or one process"


@dataclass(frozen=True)
class Part:
    """What one process computes of a step.

    Attributes:
        bands: rows of tokens of every band, from the top of the image.
        band: index of this process's.
        columns: tokens of a row.
        half: 0 for the unconditional half of guidance, 1 for the conditional one; None for all there is.
    """

    bands: Tuple[int, ...]
    band: int
    columns: int
    half: object = None

    @property
    def first_row(self):
        """First row of the band."""
        return sum(self.bands[: self.band])

    @property
    def processes(self):
        """Number of processes; number half * bands + band computes a band of a half."""
        return len(self.bands) * (1 if self.half is None else 2)


def bands_of(rows, columns, count, compression=None):
    """Rows of tokens of each of `count` bands, as equal as may be; KV compression keeps of each what it keeps of all.

    A band begins where a cell of the compression begins; rows that compression drops at the end are the last band's.

    Args:
        rows, columns: tokens a side.
        compression: KVCompression or None.

    Raises:
        MindSigmaError: there are fewer cells than bands.
    """
    unit = 1
    if compression is not None:
        unit = compression.factor
        if compression.sampling == "uniform_every":  # every factor-th token of the sequence, whatever its row
            unit //= gcd(columns, unit)
    cells = rows // unit
    if cells < count:
        raise MindSigmaError(
            f"{count} bands of rows: the image has {rows} rows of tokens, in units of {unit} that makes {cells}; "
            "take fewer processes or a larger height"
        )
    bands = [cells // count * unit + (unit if i < cells % count else 0) for i in range(count)]
    bands[-1] += rows - sum(bands)
    return tuple(bands)


def keys_of(bands, columns, compression=None):
    """Keys of self-attention that each band contributes, compressed if a KVCompression is given."""
    if compression is None:
        return tuple(rows * columns for rows in bands)
    factor = compression.factor
    if compression.sampling == "uniform_every":
        return tuple(rows * columns // factor for rows in bands)
    return tuple((rows // factor) * (columns // factor) for rows in bands)


def bytes_sent(
    config, part, images, itemsize, learned_variance=False, perturbed=(), controls=(), guided=True, guess=False,
    aligned=True,
):  # fmt: skip
    """Bytes that one process sends to the others in a step: dict with `keys` (keys and values) and `noise`.

    What it contributes to a gather it sends to each of the others, padded to the longest contribution.

    Args:
        config: DiTConfig.
        part: Part.
        images: images drawn at once.
        itemsize: bytes of an activation.
        learned_variance: whether the sampler takes it; it is counted as noise.
        perturbed: layers of perturbed attention, whose images send keys in the other layers after the first of them.
        controls: ControlNetConfigs.
        guided: whether there is an unconditional half.
        guess: guess mode, whose copies see the conditional half alone.
        aligned: whether heads are sent in the width of Ascend's kernel, as all but the CPU accelerator have them.
    """
    rows = images * (2 if guided and part.half is None else 1)
    others = part.processes - 1
    head_dim = config.hidden_size // config.num_heads
    sent = config.num_heads * (head_width(head_dim) if aligned else head_dim)  # columns of a key
    keys = 0
    if len(part.bands) > 1:
        for layer in range(config.depth):
            longest = max(keys_of(part.bands, part.columns, config.layer_compression(layer)))
            more = images if perturbed and layer > perturbed[0] and layer not in perturbed else 0
            keys += (rows + more) * longest * 2 * sent * itemsize
            copies = sum(layer < one.layers for one in controls)  # compressed as their originals are
            keys += copies * (images if guess else rows) * longest * 2 * sent * itemsize
    rows += images if perturbed else 0
    pixels = max(part.bands) * part.columns * config.patch_size**2
    channels = config.out_channels if learned_variance else config.in_channels
    return {"keys": keys * others, "noise": rows * channels * pixels * itemsize * others}


class KeyExchange(nn.Cell):
    """Keys and values of one band to those of the whole image, the same on every process of a half."""

    def __init__(self, part, compression, gather):
        super().__init__()
        self.gather = gather
        self.band = part.band
        self.begin = len(part.bands) * (part.half or 0)
        self.end = self.begin + len(part.bands)
        self.whole = keys_of(part.bands, part.columns)
        self.compressed = keys_of(part.bands, part.columns, compression)

    def construct(self, k, v):
        """k, v (N, K, C) of the band to (N, sum of all K, C), each."""
        batch, length, channels = k.shape
        lengths = self.whole if length == self.whole[self.band] else self.compressed
        kv = pad_axis(ops.concat((k, v), -1), 1, max(lengths))
        bands = self.gather(kv)[self.begin : self.end]  # (bands, N, longest K, 2 * C)
        if min(lengths) == max(lengths):
            kv = bands.transpose(1, 0, 2, 3).reshape(batch, sum(lengths), 2 * channels)
        else:
            parts = ()
            for i in range(len(lengths)):
                parts += (bands[i][:, : lengths[i]],)
            kv = ops.concat(parts, 1)
        return kv[:, :, :channels], kv[:, :, channels:]


class NoiseExchange(nn.Cell):
    """The band's prediction to that of the whole image, both halves of guidance where they are divided."""

    def __init__(self, part, rows_of_a_token, channels, gather):
        super().__init__()
        self.gather, self.channels = gather, channels
        self.rows = tuple(rows * rows_of_a_token for rows in part.bands)
        self.halves = 1 if part.half is None else 2

    def construct(self, prediction):
        """Prediction (M, channels or more, h of the band, w) to (M * halves, channels, h, w)."""
        parts = self.gather(pad_axis(prediction[:, : self.channels], 2, max(self.rows)))
        halves = ()
        for half in range(self.halves):
            bands = ()
            for i in range(len(self.rows)):
                bands += (parts[half * len(self.rows) + i][:, :, : self.rows[i]],)
            halves += (ops.concat(bands, 2) if len(bands) > 1 else bands[0],)
        return ops.concat(halves, 0) if self.halves > 1 else halves[0]


def pad_axis(x, axis, length):
    """x with zeros at the end of an axis, up to `length`."""
    missing = length - x.shape[axis]
    if missing == 0:
        return x
    zeros = ops.zeros(x.shape[:axis] + (missing,) + x.shape[axis + 1 :], x.dtype)
    return ops.concat((x, zeros), axis)


class PartStep(nn.Cell):
    """GuidedStep of one of several processes: the same arguments and results. One graph in graph mode.

    Args:
        dit: the DiT.
        sampler: Sampler.
        guided: whether there is guidance; the captions hold both halves, or the part's.
        part: Part.
        gather: function of a tensor to those of all processes, on a new first axis (Collectives.gather).
        rescale: of the guided noise.
        perturbed: layers of perturbed attention; none by default.
        control: ControlSum or None.
    """

    halves = False

    def __init__(self, dit, sampler, guided, part, gather, rescale=0.0, perturbed=(), control=None):
        super().__init__(auto_prefix=False)
        self.dit, self.sampler, self.guided, self.rescale = dit, sampler, guided, rescale
        config, p = dit.config, dit.config.patch_size
        self.channels = config.in_channels
        self.band = (part.first_row, part.bands[part.band])
        self.top, self.bottom = part.first_row * p, (part.first_row + part.bands[part.band]) * p
        self.both = guided and part.half is None
        self.network = PerturbedDiT(dit, perturbed, self.both) if perturbed else None
        self.control, self.rows, self.columns = control, part.bands[part.band], part.columns
        self.exchange_keys = None
        if len(part.bands) > 1:
            self.exchange_keys = KeyExchange(part, config.kv_compression, gather)
        sent = config.out_channels if sampler.learned_variance else self.channels
        self.exchange_noise = NoiseExchange(part, p, sent, gather)

    def position(self, shape):
        """Position embedding (1, tokens of the band, C) for latents of the whole image's shape (N, c, h, w)."""
        return self.dit.position(shape, self.band)

    def own_rows(self, latents):
        """See GuidedStep: those of the band."""
        return latents[:, :, self.top : self.bottom]

    def construct(
        self, latents, history, numbers, guidance_scale, text_kv, modulation, position, fresh=None, kept=None,
        given=None,
    ):  # fmt: skip
        """Advance the latents (N, c, h, w) of the whole image by one step, of which this process predicts its part.

        Arguments as in `GuidedStep.construct`; text_kv and position are those of the part. Returns latents and history.
        """
        band = self.own_rows(latents)
        inputs = ops.concat((band, band), 0) if self.both else band
        perturbed, control = None, None
        if self.control is not None:
            control = self.of_control(given)
        if self.network is None:
            prediction = self.dit.denoise(inputs, modulation, text_kv, position, self.exchange_keys, control)
            prediction = self.exchange_noise(prediction)
        else:
            both = self.network(inputs, modulation, text_kv, position, None, self.exchange_keys, control)
            both = self.exchange_noise(ops.concat(both, 0))
            prediction, perturbed = both[: inputs.shape[0]], both[inputs.shape[0] :]
        noise = guide(prediction, guidance_scale, self.guided, self.channels, self.rescale, perturbed)
        variance = None
        if self.sampler.learned_variance:
            variance = variance_of(prediction, self.guided, self.channels)
        return self.sampler(latents, history, scalars(numbers), noise, variance, fresh)

    def of_control(self, given):
        """See GuidedStep."""

        def added(x):
            return self.control(x, given, self.rows, self.columns, self.exchange_keys, self.both)

        return added


class ParallelGraphs(DenoisingGraphs):
    """The graphs of this process's part."""

    def __init__(self, dit, parallel):
        super().__init__(dit)
        self.parallel, self.joined = parallel, parallel.half is None

    def halves(self, unconditional, conditional):
        """Both halves, or the one that this process computes."""
        half = self.parallel.half
        return super().halves(unconditional, conditional) if half is None else (unconditional, conditional)[half]

    def step(self, sampler, guided, shape, halves=False, kind=PLAIN, rescale=0.0, perturbed=(), control=None):
        """PartStep for latents of this shape; only of the plain kind."""
        if control is not None and control.guess and self.parallel.half is not None:
            raise MindSigmaError(NOT_GUESSED)
        if perturbed and self.parallel.half is not None:
            raise MindSigmaError(NOT_HALVED)
        if kind != PLAIN:
            raise MindSigmaError("text_reuse and block_reuse (--text-reuse, --block-reuse) are for one process")
        if halves:
            raise MindSigmaError("guidance_halves (--guidance-halves) is for one process; several divide the work")
        config = self.dit.config
        part = self.parallel.part(config, guided, shape[2] // config.patch_size, shape[3] // config.patch_size)
        key = sampler.graph, guided, part, rescale, perturbed, control
        if key not in self._steps:
            gather = self.parallel.collectives.gather
            self._steps[key] = PartStep(self.dit, sampler, guided, part, gather, rescale, perturbed, control)
        return self._steps[key]


class ParallelSampling:
    """How the processes of msrun share the drawing of images.

    Args:
        mode: "sequence": each has a band of the image's rows of tokens; "cfg": two processes, one a half of guidance;
            "both": one half of the processes for each half of guidance, and bands among these.
        ranks: Ranks; by default those that msrun started, which are joined.

    Raises:
        MindSigmaError: the number of processes does not fit the mode.
    """

    def __init__(self, mode, ranks=None):
        self.mode = one_of("parallel", mode, MODES)
        ranks = join_ranks() if ranks is None else ranks
        if ranks.count == 1:
            raise MindSigmaError(
                f"parallel {mode}: there is one process only; start several with tools/launch/generate_cpu.sh, "
                "tools/launch/generate_ascend.sh or msrun"
            )
        if mode == "cfg" and ranks.count != 2:
            raise MindSigmaError(f"parallel cfg takes 2 processes, not {ranks.count}; take 'both' or 'sequence'")
        if mode == "both" and (ranks.count % 2 or ranks.count < 4):
            raise MindSigmaError(f"parallel both takes an even number of at least 4 processes, not {ranks.count}")
        self.ranks = ranks
        self.collectives = Collectives(ranks)
        self.bands = {"sequence": ranks.count, "cfg": 1, "both": ranks.count // 2}[mode]
        self.half = None if mode == "sequence" else ranks.rank // self.bands

    @property
    def first(self):
        """Whether this process reports and writes."""
        return self.ranks.first

    def part(self, config, guided, rows, columns):
        """Part of this process for an image of rows x columns tokens.

        Raises:
            MindSigmaError: no guidance to divide, or too few rows.
        """
        if self.half is not None and not guided:
            raise MindSigmaError(f"parallel {self.mode} divides guidance, but the guidance scale is at most 1")
        compression = config.kv_compression if self.bands > 1 else None
        bands = bands_of(rows, columns, self.bands, compression)
        return Part(bands, self.ranks.rank % self.bands, columns, self.half)

    def caption(self, encode):
        """Caption that encode() makes in the first process; the others need no text encoder."""
        caption = encode() if self.first else None
        arrays = (caption.states.asnumpy(), caption.mask.asnumpy()) if self.first else (None, None)
        return Caption(*(Tensor(self.collectives.array_from_rank(0, array)) for array in arrays))

    def apply(self, function, items):
        """Like `map`, each call in one of the processes; all get all results, float32 ndarrays of one shape."""
        return self.collectives.spread(function, items)
